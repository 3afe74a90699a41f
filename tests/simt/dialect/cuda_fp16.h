#pragma once  // kernels may include the toolkit's header; simt.h has what they need of it
