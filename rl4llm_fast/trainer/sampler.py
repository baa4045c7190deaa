"""Who answers the prompts: the policy itself, or an inference engine beside it that is given each update's weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .ahead import Ahead
from .distributed import say
from .extras import require
from .model import end_token_ids, model_source
from .policy import Policy
from .run import Trainer
from .sampling import Rollout, sample

Answer = tuple[list[int], list[float]]  # token ids, the end token included where it came, and their log-probabilities


class Sampler(Protocol):
    """An inference engine with weights of its own, which answers prompts in the place of the policy.

    The loss sees what it reports: ``rollout_correction`` weighs the difference between its log-probabilities and the
    policy's own on the same tokens, which ``sampler_gap`` logs.
    """

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, by their names in the model of transformers.

        Called before the first answers and, after every update, before the next ones.
        """

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        end_ids: Collection[int],
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
    ) -> Sequence[Answer]:
        """One answer to each prompt, the i-th drawn with ``seed + i``: a prompt comes once for each of its answers.

        Log-probabilities are at the temperature, before top-p and top-k; a ``top_k`` of 0 is none.
        """


class SamplingTrainer(Trainer):
    """A trainer that learns from answers to prompts; its config has the settings of ``sample``."""

    config: Any
    policy: Policy
    sampler: Sampler | None = None
    ahead: Ahead | None = None  # draws the next step's answers during this one
    _pushed = -1  # the number of updates that the sampler's weights have seen

    def set_up_sampling(self, sampler: Sampler | None) -> None:
        """The sampler, given or named by the config, and the tokens that end an answer."""
        c = self.config
        if sampler is None and c.sampler == "vllm":
            sampler = VLLMSampler(model_source(c.model), seed=c.seed, **c.sampler_options)
        self.sampler = sampler
        self.end_ids = end_token_ids(self.model, self.tokenizer, c.stop_tokens)
        if not self.end_ids:
            if getattr(c, "overlong", "keep") == "mask":  # every answer would be masked, and nothing learned
                raise ValueError(
                    "config: overlong: wanted keep, or stop_tokens, where no token ends an answer, got 'mask'"
                )
            say(f"tokenizer, model: have no end token; every answer goes on to max_new_tokens = {c.max_new_tokens}, "
                "unless stop_tokens names one")  # fmt: skip

    def set_up_ahead(self, prompts_of: Callable[[int], Sequence[list[int]]], group_size: int) -> None:
        """From now on the answers of a step are drawn during the one before it; ``prompts_of`` a step its prompts."""
        self.config.wanted(self.ranks.size == 1, "overlap", "false with several processes")

        def draw(prompts: Sequence[list[int]], generator: torch.Generator, policy: Policy | None) -> Rollout:
            return self._answers(prompts, group_size, generator, policy or self.policy)

        self.ahead = Ahead(draw, prompts_of, self.policy, engine=self.sampler is not None)

    def begin(self, step: int) -> None:
        """Begin to draw the answers of ``step``, under the weights as they are."""
        assert self.ahead is not None
        self.push_weights()
        self.ahead.start(step, self.generator)

    def drawn(self, step: int) -> Rollout:
        """The answers of ``step`` that were begun during the one before; the first one's are begun now."""
        assert self.ahead is not None
        if self.ahead.step != step:
            self.begin(step)
        return self.ahead.take()

    def state(self) -> dict[str, Any]:
        own = super().state()
        return own if self.ahead is None else {"policy": own, "ahead": self.ahead.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state if self.ahead is None else state["policy"])
        if self.ahead is not None:
            self.ahead.load_state_dict(state["ahead"])

    def draw(
        self, prompts: Sequence[list[int]], group_size: int = 1, *, generator: torch.Generator | None = None
    ) -> Rollout:
        """``group_size`` answers to each of ``prompts``, under the weights as they are now."""
        if self.sampler is not None:
            self.push_weights()
        return self._answers(prompts, group_size, generator or self.generator, self.policy)

    def push_weights(self) -> None:
        """Give the sampler the weights as they are now, unless it has them."""
        if self.sampler is not None and self._pushed != self.updates:
            self.sampler.load_weights((name, p.detach()) for name, p in self.model.named_parameters())
            self._pushed = self.updates

    def _answers(
        self, prompts: Sequence[list[int]], group_size: int, generator: torch.Generator, policy: Policy
    ) -> Rollout:
        c = self.config
        options = {"max_new_tokens": c.max_new_tokens, "end_ids": self.end_ids, "temperature": c.temperature,
                   "top_p": c.top_p, "top_k": c.top_k}  # fmt: skip
        if self.sampler is None:  # the backend as an argument: use_backend is the process's, and this may be a thread
            return sample(
                policy, prompts, group_size=group_size, generator=generator, batch_size=c.sampling_batch_size,
                ranks=self.ranks, backend=None if c.backend == "auto" else c.backend, **options,
            )  # fmt: skip
        # Each process has a sampler of its own; the seeds are drawn alike everywhere, and go on with the run.
        seed = int(torch.randint(2**30, (), generator=generator)) + self.ranks.cut(len(prompts)).start * group_size
        own = [prompt for prompt in self.ranks.share(list(prompts)) for _ in range(group_size)]
        answers = list(self.sampler.generate(own, seed=seed, **options)) if own else []
        _check(answers, len(own), c.max_new_tokens, self.limits.vocabulary)
        answers = self.ranks.gather([(list(ids), list(logp)) for ids, logp in answers])
        return Rollout(
            list(map(list, prompts)), group_size, [ids for ids, _ in answers], [logp for _, logp in answers],
            [ids[-1] in self.end_ids for ids, _ in answers],
        )  # fmt: skip


def _check(answers: Sequence[Any], count: int, max_new_tokens: int, vocabulary: int | None) -> None:
    """Refuse what no sampler may return: the loss would learn from nonsense without a word."""
    if len(answers) != count:
        raise ValueError(f"sampler: wanted {count} answers, got {len(answers)}")
    for i, (ids, logp) in enumerate(answers):
        if len(ids) != len(logp):
            raise ValueError(f"sampler: answer {i} has {len(ids)} tokens and {len(logp)} log-probabilities")
        if not 0 < len(ids) <= max_new_tokens:
            raise ValueError(f"sampler: answer {i}: wanted 1 to {max_new_tokens} tokens, got {len(ids)}")
        if min(ids) < 0 or (vocabulary is not None and max(ids) >= vocabulary):
            raise ValueError(f"sampler: answer {i} has tokens outside the vocabulary [0, {vocabulary})")
        if not all(math.isfinite(value) and value < 1e-3 for value in logp):
            raise ValueError(f"sampler: answer {i}: wanted log-probabilities, got {max(logp):g} among them")


class VLLMSampler:
    """vLLM in this process, on this process's device.

    Its log-probabilities are those of the distribution that was drawn from: with top-p or top-k, of what these leave.

    Args:
        model: what vLLM loads, a folder or an id; the weights are then the policy's.
        options: go to ``vllm.LLM``, e.g. ``gpu_memory_utilization = 0.3`` beside a policy on the same GPU.

    Raises:
        ImportError: vLLM is missing.
    """

    def __init__(self, model: str, *, seed: int = 0, **options: Any) -> None:
        require("vllm", extra="vllm")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the weights are handed over within the process
        import vllm

        self._params = vllm.SamplingParams
        self.llm: Any = vllm.LLM(model=model, seed=seed, logprobs_mode="processed_logprobs", **options)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights(weights)
        self.llm.reset_prefix_cache()  # its keys and values are the old weights'

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        end_ids: Collection[int],
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int,
    ) -> list[Answer]:
        params = [  # a seed each: the same seed and prompt would give the same answer
            self._params(
                max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed + i,
                stop_token_ids=sorted(end_ids), ignore_eos=True, logprobs=0, detokenize=False,
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return [
            (list(a.token_ids), [step[token].logprob for token, step in zip(a.token_ids, a.logprobs, strict=True)])
            for a in answers
        ]
