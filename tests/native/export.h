#pragma once

#define PKT_EXPORT extern "C" __attribute__((visibility("default")))
