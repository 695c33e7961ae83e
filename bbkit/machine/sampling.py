"""Group sampling with one prefill a prompt; the same completions under the same seed.

Serves the claim that Capability-Aware GRPO comes at no cost. transformers and TRL send a prompt
through the model once a completion. Here each distinct prompt goes once, its cache is repeated, and
rows that have ended leave the batch. Random numbers are drawn for all rows to the end, so that each
row meets its own. Where that may not hold, what would have been called is called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

# What looks at each row alone: other processors and criteria may need the rows that have left.
ROW_BY_ROW = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "RepetitionPenaltyLogitsProcessor", "MaxLengthCriteria", "EosTokenCriteria",
}  # fmt: skip
ASKED = {"input_ids", "attention_mask", "generation_config"}  # of text, as TRL asks
KNOWN = {"attention_mask", "position_ids", "past_key_values", "use_cache"}


class CannotShare(Exception):
    """These prompts, options or this model need the plain way; nothing has been drawn yet."""


@contextmanager
def one_prefill_a_prompt(model: Any) -> Iterator[None]:
    """Within it `model.generate`, of a transformers or PEFT model, samples by `sample`.

    Plain where it cannot: beams or greedy, rows that know of one another (watermarks, guidance),
    stop strings or times, images, a streamer, caches that are not plain dynamic ones, FSDP, ZeRO
    stage 3, soft prompts; a `generate` that is not transformers' own, as unsloth's. In 16 bit, or
    on a GPU, products of fewer rows may round otherwise: now and then another token is drawn.

    >>> from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, intermediate_size=8, **sizes))
    >>> asked = GenerationConfig(do_sample=True, max_new_tokens=5)
    >>> with one_prefill_a_prompt(model):
    ...     len(model.generate(input_ids=torch.tensor([[3, 4]] * 4), generation_config=asked))
    4
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    peft = getattr(model, "active_peft_config", None)
    if (
        getattr(type(base), "generate", None) is not GenerationMixin.generate
        or any("generate" in vars(m) for m in (model, model.base_model, base))
        or "unsloth" in sys.modules
        or is_deepspeed_zero3_enabled()
        or is_fsdp_managed_module(base)
        or any(getattr(peft, k, None) for k in ("is_prompt_learning", "alora_invocation_tokens"))
    ):
        yield
        return
    plain = model.generate

    def generate(*args: Any, **options: Any) -> Any:
        with suppress(CannotShare):
            if not args and options.keys() <= ASKED:
                return plain(custom_generate=sample, **options)
        return plain(*args, **options)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate


def sample(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any,
    generation_config: Any, **state: Any,
) -> Tensor:  # fmt: skip
    """Token ids (B, L + new), as GenerationMixin._sample returns, in whose place `generate` calls.

    `input_ids` (B, L) are left-padded prompts, `state` their mask, positions and empty cache.
    Raises CannotShare before anything is drawn.
    """
    cache: Any = state.get("past_key_values")
    asked = generation_config
    parts = {type(p).__name__ for p in (*logits_processor, *stopping_criteria)}
    if (
        asked.get_generation_mode() != "sample" or asked.return_dict_in_generate
        or asked.prefill_chunk_size or model.config.is_encoder_decoder
        or not parts <= ROW_BY_ROW or state.keys() - {"logits_to_keep"} != KNOWN
        or type(cache) is not DynamicCache or cache.get_seq_length() or cache.offloading
        or any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers)
        or state["position_ids"].shape != input_ids.shape
    ):  # fmt: skip
        raise CannotShare

    def rows(state: dict, chosen: Tensor) -> dict:
        return state | {k: state[k][chosen] for k in ("attention_mask", "position_ids")}

    prompts = torch.cat([input_ids, state["attention_mask"]], 1)
    which = prompts.unique(dim=0, return_inverse=True)[1]
    first = torch.stack([(which == k).nonzero()[0, 0] for k in range(int(which.max()) + 1)])
    inputs = model.prepare_inputs_for_generation(
        input_ids[first], is_first_iteration=True, **rows(state, first)
    )
    out = model(**inputs, return_dict=True)
    logits = out.logits[:, -1].float()[which]
    cache.batch_select_indices(which)
    pad = asked._pad_token_tensor
    left, ids, columns = torch.arange(len(which), device=which.device), input_ids, []
    chances = logits.new_ones(logits.shape)  # rows that have left keep their last, and draw on
    while True:
        state = model._update_model_kwargs_for_generation(out, state)
        chances[left] = logits_processor(ids, logits).softmax(-1)
        drawn = torch.multinomial(chances, 1)
        ids = torch.cat([ids, drawn[left]], 1)
        column = torch.full_like(drawn, 0 if pad is None else pad)
        column[left] = drawn[left]
        columns.append(column)
        stay = ~stopping_criteria(ids, None)
        if not stay.any():
            return torch.cat([input_ids, *columns], 1)
        if not stay.all():
            left, ids, state = left[stay], ids[stay], rows(state, stay)
            cache.batch_select_indices(stay)
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **state)
        out = model(**inputs, return_dict=True)
        logits = out.logits[:, -1].to(torch.float32, copy=True)
