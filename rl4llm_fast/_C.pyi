from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    time: str
    compiler: str
    torch_target_abi: str
    cpu_instruction_sets: list[str]
    cpu_flags: str
    cpu_instruction_set_flags: list[str]
    cpu_instruction_set_in_use: str
    cuda: str | None
    cuda_archs: list[str]
    no_cuda_reason: str | None

def build_info() -> BuildInfo: ...
def force_cpu_isa(name: str | None) -> None: ...
def check_offsets(offsets: int, count: int, tokens: int) -> None: ...
def register_policy_formula(name: str, isa: str, fp32: int, fp64: int) -> None: ...
