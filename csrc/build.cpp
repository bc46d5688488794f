// peftkern._build: what this build is made of, for `python -m peftkern` and for bug reports.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_build, m) {
  m.attr("version") = PEFTKERN_VERSION;
  m.attr("commit") = PEFTKERN_COMMIT;
  m.attr("compiler") = PEFTKERN_COMPILER;
  m.attr("torch") = PEFTKERN_TORCH;
  m.attr("isas") = PEFTKERN_ISAS;
  m.attr("cuda") = PEFTKERN_CUDA;
  m.attr("architectures") = PEFTKERN_ARCHITECTURES;
}
