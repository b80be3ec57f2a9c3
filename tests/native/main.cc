// Entry point of the unit tests of xla_ops that need neither MPI nor ranks.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
