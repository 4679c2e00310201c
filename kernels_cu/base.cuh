// Integer types, and what differs between compilers. NVRTC has no <cstdint> and needs no header for these.
#pragma once
#ifdef __CUDACC_RTC__
using int32_t = int;
using uint8_t = unsigned char;
using uint64_t = unsigned long long;
// A constant in every NVRTC; __builtin_offsetof came with 13.4.
#define EP_OFFSETOF(type, field) __INTADDR__(&static_cast<type*>(nullptr)->field)
#else
#include <cstdint>
#define EP_OFFSETOF(type, field) __builtin_offsetof(type, field)
#endif
