// Symbol visibility of the public library.
#pragma once

#if defined(_WIN32)
#define KALMANET_API
#else
#define KALMANET_API __attribute__((visibility("default")))
#endif
