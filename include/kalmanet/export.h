/* Symbol visibility of the public library, for C and C++. */
#ifndef KALMANET_EXPORT_H
#define KALMANET_EXPORT_H

#if defined(_WIN32)
#define KALMANET_API
#else
#define KALMANET_API __attribute__((visibility("default")))
#endif

#endif
