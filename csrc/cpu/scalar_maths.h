// The maths of the generated formulas on one double: for numbers of which there are few. The ops' own files only.
#pragma once

#include "hd.h"

namespace rl4llm {

struct ScalarMaths {
  typedef double S;
  typedef double F;
  static double c(double x) { return x; }
  static double where(bool condition, double a, double b) { return condition ? a : b; }
  static double exp(double x) { return __builtin_exp(x); }
  static double log(double x) { return __builtin_log(x); }
  static double expm1(double x) { return __builtin_expm1(x); }
  static double log1p(double x) { return __builtin_log1p(x); }
  static double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  static double logsigmoid(double x) { return (x < 0 ? x : x >= 0 ? 0 : x) - log1p(exp(-__builtin_fabs(x))); }
};

}  // namespace rl4llm
