"""Decoding without Python between: a transformers model's tokens one after the other, each one compiled call.

transformers' own `generate` runs every module of a model anew for each token. On a CPU, at one token, a small model
spends more time on that than on reading its weights. Here a prompt is read as transformers reads it; after that each
token is one call of a graph that was compiled once (`torch.compile`), from the last token to the next one:

- keys and values lie in buffers of a fixed size, but only what is filled of them is attended to;
- to one new token nothing is masked: it attends to all keys there are, or to those in a layer's window, and the heads
  that share keys are the rows of one product;
- what depends on the model and not on the token (guards, shapes, which kernels) is decided once.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# transformers makes no mask for an attention that it knows no masks of.
ATTENTION = "acip_decoding"
# What some models tell their attention beside queries, keys and values, and ours would have to know about.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


def generate(model: PreTrainedModel, input_ids: Tensor, max_new_tokens: int, **options) -> Tensor:
    """One call of a `Decoder` made for it. Compiling takes longer than most answers: keep a `Decoder` for more.

    options: those of `Decoder.__call__`.
    """
    decoder = Decoder(model, input_ids.shape[-1] + max_new_tokens, batch_size=len(input_ids))
    return decoder(input_ids, max_new_tokens, **options)


class Decoder:
    """A model's compiled decoding loop: `decoder(input_ids, max_new_tokens)`.

    The graph is compiled at the first call and holds the model as it is then: after the model is changed (its
    modules, not only numbers in its weights) another `Decoder` is needed.

    Args:
        model: a transformers causal language model in evaluation mode, whose layers attend to all tokens before them
            or to a window of those.
        max_length: how many tokens the buffers hold, those of the prompt and the new ones.
        batch_size: of all calls.
        freeze: compile with the parameters as constants. What torch multiplies by is then kept a second time, in the
            order in which it is read: faster, and larger. The layers that this package's kernels compute read the
            parameters themselves either way, so a fused model grows by little.

    Raises:
        TypeError: no transformers model. ValueError: one that this cannot decode, or no such sizes.
    """

    def __init__(self, model: PreTrainedModel, max_length: int, *, batch_size: int = 1, freeze: bool = True):
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        if model.config.is_encoder_decoder or not model._can_set_attn_implementation():
            raise ValueError(f"{type(model).__name__} is no decoder whose attention can be replaced")
        self.model, self.max_length, self.batch_size, self.freeze = model, max_length, batch_size, freeze
        self._windows = _windows(model.config.get_text_config(decoder=True))
        self._parameters = inspect.signature(model.forward).parameters
        self._cache_name = cache_name(model)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._steps: dict[tuple, Callable] = {}

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompts and what follows them, int64 `[batch_size, prompt + at most max_new_tokens]`.

        Args:
            input_ids: int64 `[batch_size, prompt]`, without padding.
            do_sample: draw each token from the model's distribution, changed in this order: logits over
                `temperature`; only the `top_k` likeliest; only the likeliest that reach `top_p` together. Else the
                likeliest one is taken, as by transformers' `generate`.
            eos_token_id: what ends an answer; None for the model's own, `()` for nothing. A batch ends with its last
                answer; those that end before are filled up with `pad_token_id` (None for the model's own, or the
                first of `eos_token_id`).
            generator: what is drawn with; None for torch's own.

        Raises ValueError for a prompt of another batch size, an empty one, or one without room for what is wanted.
        """
        self._check(input_ids, max_new_tokens)
        ends = self._ends(eos_token_id)
        pad = next((p for p in (pad_token_id, self.model.generation_config.pad_token_id, *ends) if p is not None), 0)
        choose = None
        if do_sample:
            choose = _Sampler(temperature, top_k, top_p, generator)
        elif (temperature, top_k, top_p) != (1.0, None, None):
            raise ValueError("temperature, top_k and top_p are for do_sample=True")

        prompt = input_ids.shape[1]
        seen = input_ids.new_zeros(self.batch_size, self.max_length)
        seen[:, :prompt] = input_ids
        logits = self._read(input_ids)
        token = choose(logits) if choose else logits.argmax(-1, keepdim=True)
        step, keys, values = self._step(greedy=choose is None), self._keys, self._values
        ended = torch.zeros(self.batch_size, 1, dtype=torch.bool, device=input_ids.device)
        end_ids = torch.tensor(ends, device=input_ids.device)
        with self._decoding():
            for length in range(prompt + 1, prompt + max_new_tokens + 1):
                if ends:
                    token = token.masked_fill(ended, pad)
                    ended |= torch.isin(token, end_ids)
                seen[:, length - 1 : length] = token
                if length == prompt + max_new_tokens or (ends and bool(ended.all())):
                    break
                so_far = seen[:, :length]
                if length == prompt + 1:
                    torch._dynamo.maybe_mark_dynamic(so_far, 1)
                token = step(so_far, keys, values)
                if choose:
                    token = choose(token)
        return seen[:, :length].clone()

    def _check(self, input_ids: Tensor, max_new_tokens: int) -> None:
        if self.model.training:
            raise ValueError("the model must be in evaluation mode: model.eval()")
        if input_ids.dim() != 2 or len(input_ids) != self.batch_size or not input_ids.shape[1]:
            raise ValueError(f"input_ids must be [{self.batch_size}, at least 1], got {list(input_ids.shape)}")
        if max_new_tokens < 1 or input_ids.shape[1] + max_new_tokens > self.max_length:
            raise ValueError(
                f"max_new_tokens must be at least 1 and leave room for the prompt in max_length={self.max_length}, "
                f"got {max_new_tokens} after {input_ids.shape[1]} tokens"
            )

    def _ends(self, eos_token_id) -> list[int]:
        ends = self.model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    def _read(self, input_ids: Tensor) -> Tensor:
        """Reads the prompt into the buffers as transformers does; returns the last token's logits, float32."""
        options = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
        output = self.model(input_ids=input_ids, use_cache=True, **options)
        length = input_ids.shape[1]
        layers = output[self._cache_name].layers
        if len(layers) != len(self._windows):
            raise ValueError(f"the model's cache has {len(layers)} layers, its configuration {len(self._windows)}")
        if not self._keys:
            for layer in layers:
                for buffers, part in ((self._keys, layer.keys), (self._values, layer.values)):
                    buffers.append(part.new_zeros(*part.shape[:2], self.max_length, part.shape[3]))
        for layer, keys, values in zip(layers, self._keys, self._values):
            # A layer with a window has kept no more of the prompt than that.
            keys[:, :, length - layer.keys.shape[2] : length] = layer.keys
            values[:, :, length - layer.values.shape[2] : length] = layer.values
        return output.logits[:, -1].float()

    def _step(self, greedy: bool) -> Callable:
        """`step(seen [batch, length], keys, values)`: reads the last token of `seen`, which stands at `length - 1`,
        and returns the likeliest next one, int64 `[batch, 1]`, or else the logits, float32 `[batch, vocabulary]`.
        """
        # What is compiled counts on the number of threads.
        key = greedy, torch.get_num_threads()
        if key in self._steps:
            return self._steps[key]
        model, windows, cache_name = self.model, self._windows, self._cache_name

        def step(seen: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
            length = seen.shape[1]
            cache = _Filled(keys, values, windows, length - 1)
            positions = torch.arange(length - 1, length, device=seen.device).unsqueeze(0)
            options = {"position_ids": positions, cache_name: cache}
            logits = model(input_ids=seen[:, -1:], use_cache=True, **options).logits[:, -1].float()
            return logits.argmax(-1, keepdim=True) if greedy else logits

        # Dynamo keeps what it compiled with the code, and here nothing of it would tell one model from another.
        step = types.FunctionType(step.__code__.replace(), globals(), step.__name__, None, step.__closure__)
        compiled = torch.compile(step, fullgraph=True, options=_options(model.device, self.freeze))
        self._steps[key] = compiled
        return compiled

    @contextlib.contextmanager
    def _decoding(self) -> Iterator[None]:
        """While a step may be compiled: the model attends as here, and its parameters are constants of the graph."""
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        try:
            with torch._inductor.config.patch(freezing=self.freeze):
                yield
        finally:
            self.model.set_attn_implementation(own)


def _options(device: torch.device, freeze: bool) -> dict:
    options = {"guard_filter_fn": _shapes_alone, "freezing": freeze}
    if device.type == "cpu":
        # Nothing is checked that has been the same since it was compiled; loops have names in torch's profiler. Not
        # inductor's C++ wrapper: it calls operators of other packages through Python, and compiles twice as long.
        checks = ("size_asserts", "alignment_asserts", "scalar_asserts")
        options |= {**dict.fromkeys(checks, False), "cpp.enable_kernel_profile": True}
    return options


def _shapes_alone(guards: Sequence) -> list[bool]:
    """Of what was assumed while compiling, what is checked at each call: how shapes relate. All else is the model."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


# ---- keys and values


class _Filled(Cache):
    """The buffers during one step: each layer's new keys and values go to `past`, and what is filled is handed out."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], windows: Sequence[int | None], past: int):
        super().__init__(layers=[_FilledLayer(*parts, past) for parts in zip(keys, values, windows)])


class _FilledLayer(CacheLayerMixin):
    def __init__(self, keys: Tensor, values: Tensor, window: int | None, past: int):
        super().__init__()
        self.keys, self.values, self.window, self.past = keys, values, window, past
        self.is_initialized, self.is_sliding = True, window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.past + 1
        self.keys[:, :, self.past : end] = key_states
        self.values[:, :, self.past : end] = value_states
        # While tracing this is assumed of all later lengths, and compiled again at the first one of which it is not so.
        start = 0 if self.window is None or end <= self.window else end - self.window
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # transformers asks for this to make a mask, and makes none for an attention that it knows no masks of.
        raise RuntimeError("this model makes a mask for each token, which the compiled loop does not: use generate()")

    def get_seq_length(self) -> int:
        return self.past

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # its name before transformers 5.24


def _windows(config) -> list[int | None]:
    """Of each layer, how many tokens it attends to; None for all. Raises ValueError for what is neither."""
    types_ = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types_ is None:
        chunked = getattr(config, "attention_chunk_size", None) is not None
        kind = "chunked_attention" if chunked else "full_attention" if window is None else "sliding_attention"
        types_ = [kind] * config.num_hidden_layers
    unknown = set(types_) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"no decoding for layers of {', '.join(sorted(unknown))}")
    return [window if kind == "sliding_attention" else None for kind in types_]


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """transformers' attention function, for one new token `query [batch, heads, 1, width]` and all it attends to."""
    told = [name for name in _UNKNOWN if options.get(name) is not None]
    if attention_mask is not None or query.shape[2] != 1 or told:
        raise ValueError(f"no decoding for an attention with a mask, or {', '.join(_UNKNOWN)}")
    batch, heads, _, width = query.shape
    # Heads that share keys are the rows of one product with them, instead of copies of the keys.
    rows = query.view(batch, key.shape[1], heads // key.shape[1], width)
    y = F.scaled_dot_product_attention(rows, key, value, scale=scaling)
    return y.reshape(batch, 1, heads, value.shape[3]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)


# ---- drawing


class _Sampler:
    """A token for logits [batch, vocabulary], drawn after temperature, top_k and top_p."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None):
        if temperature <= 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(
                "temperature must be above 0, top_k at least 1 and top_p above 0 and at most 1, "
                f"got {temperature}, {top_k} and {top_p}"
            )
        self.temperature, self.top_k, self.top_p, self.generator = temperature, top_k, top_p, generator

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            # From the least likely up: what is left out sums to no more than 1 - top_p, and never is all.
            ordered, order = logits.sort()
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False
            logits = logits.masked_fill(out.scatter(1, order, out), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)


def cache_name(model: PreTrainedModel) -> str:
    """What `model` calls the cache that its forward takes and returns; transformers 5.24 has given it another name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
