// The Python module rl4llm_fast._C. Importing it registers the compiled ops with torch (csrc/cpu, csrc/cuda); what it
// offers to Python itself is build_info(), a check of offsets and the door for formulas that are compiled at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "build_config.h"  // written by setup.py
#include "cpu/isa.h"
#include "cpu/offsets.h"
#include "cpu/token_loss.h"

namespace py = pybind11;

const char* rl4llm_build_time();

namespace {

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, separator);) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = RL4LLM_VERSION;
  info["time"] = rl4llm_build_time();
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_target_abi"] =
      std::to_string(TORCH_TARGET_VERSION >> 56 & 255) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 255);
  info["cpu_instruction_sets"] = split(RL4LLM_CPU_ISAS, ',');
  info["cpu_flags"] = RL4LLM_CPU_FLAGS;
  info["cpu_instruction_set_flags"] = split(RL4LLM_ISA_FLAGS, ';');
  info["cpu_instruction_set_in_use"] = rl4llm::isa_name(rl4llm::chosen_isa());
#ifdef RL4LLM_CUDA_VERSION
  info["cuda"] = RL4LLM_CUDA_VERSION;
  info["cuda_archs"] = split(RL4LLM_CUDA_ARCHS, ';');
  info["no_cuda_reason"] = py::none();
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = py::list();
  info["no_cuda_reason"] = RL4LLM_NO_CUDA;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of rl4llm_fast: registered with torch.library at import, called through torch.ops";
  m.def("build_info", &build_info, "What was built, with what, when, and which instruction set this machine runs");
  m.def(
      "force_cpu_isa", [](std::optional<std::string> name) { rl4llm::force_isa(name ? name->c_str() : nullptr); },
      py::arg("name"), "For tests: run the CPU ops on 'avx512', 'avx2' or 'baseline'; None returns to the choice made");
  m.def(
      "check_offsets",
      [](std::uintptr_t offsets, std::int64_t count, std::int64_t tokens) {
        rl4llm::check_offsets(reinterpret_cast<const std::int64_t*>(offsets), count, tokens);
      },
      py::arg("offsets"), py::arg("count"), py::arg("tokens"),
      "ValueError unless the int64 cu_seqlens at an address fit the packed tokens (rl4llm_fast/sequences.py)");
  m.def(
      "register_policy_formula",
      [](const std::string& name, const std::string& isa, std::uintptr_t fp32, std::uintptr_t fp64) {
        rl4llm::register_policy_formula(name.c_str(), isa.c_str(),
                                        reinterpret_cast<rl4llm::PolicyFunction<float>>(fp32),
                                        reinterpret_cast<rl4llm::PolicyFunction<double>>(fp64));
      },
      py::arg("name"), py::arg("isa"), py::arg("fp32"), py::arg("fp64"),
      "Hands over the addresses of a formula compiled for one instruction set (rl4llm_fast/user_losses.py)");
}
