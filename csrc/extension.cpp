// pkt._C: an empty module. Loading it runs the registrations in rsvd_cpu.cpp and rsvd_cuda.cu.

#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
