"""Two devices that no machine has: their tensors are computed on the CPU, and refuse to meet those of another device.

Run as a program it spreads a base model over both and prints, as JSON, what it answers, how it scores and what it
trains, beside what the same base says that lies on the CPU. It changes torch for the whole process.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from raymerge.adapters.adapter import LoraAdapter, LoraModule
from raymerge.models.base import BaseModel, load_base
from raymerge.models.generation import GenerationSettings, generate, score_references
from raymerge.models.layers import linear_modules, shape_of
from raymerge.models.multilora import MultiLora
from raymerge.models.training import TrainingGroup, TrainingSettings, train

KIND = "pair"
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w1"]
ANY_DEVICE = {torch.ops.aten.copy_, torch.ops.aten.index, torch.ops.aten.index_put_}  # operands of the CPU may join


class Placed(Tensor):
    """A tensor of the CPU that says it lies on a device of the pair."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "Placed":
        shape = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        out = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=device, **shape)
        out.held = held.detach()
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, dict(kwargs or {}))

    def tolist(self) -> Any:
        return self.held.tolist()


class Pair(TorchDispatchMode):
    """Within it, tensors can be made on the pair."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, dict(kwargs or {}))


class Literals(TorchFunctionMode):
    """torch.tensor would look for the device's own memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on the CPU. Raises RuntimeError if its operands do not lie together."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    placed = {x.device for x in operands if isinstance(x, Placed)}
    mixed = bool(placed) and any(x.ndim and not isinstance(x, Placed) for x in operands)
    if func.overloadpacket is torch.ops.aten.copy_:
        placed = {args[0].device} if isinstance(args[0], Placed) else set()
    elif len(placed) > 1 or (mixed and func.overloadpacket not in ANY_DEVICE):
        raise RuntimeError(f"{func}: operands lie on {sorted({str(x.device) for x in operands})}")
    where = next(iter(placed), None)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        where = asked if asked.type == KIND else None
        kwargs["device"] = torch.device("cpu") if asked.type == KIND else asked
    inner_args, inner_kwargs = tree_map(lambda x: x.held if isinstance(x, Placed) else x, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    if where is None:
        return out
    own = {id(x.held): x for x in operands if isinstance(x, Placed)}  # what is changed in place is given back
    return tree_map(lambda x: own[id(x)] if id(x) in own else Placed(x, where) if isinstance(x, Tensor) else x, out)


def spread(base: BaseModel, devices: Mapping[str, torch.device]) -> BaseModel:
    """The base with each block on its device, as transformers would lay it on two GPUs."""
    model = base.model
    for name, device in devices.items():
        if device.type != KIND:
            continue
        for module in model.get_submodule(name).modules():
            for key, value in list(module._parameters.items()):
                if value is not None:
                    module._parameters[key] = nn.Parameter(Placed(value.detach(), device), requires_grad=False)
            for key, value in list(module._buffers.items()):
                if value is not None:
                    module._buffers[key] = Placed(value, device)
    skipped = model._skip_keys_device_placement
    accelerate.dispatch_model(model, devices, force_hooks=True, skip_keys=skipped)
    return BaseModel(model, base.tokenizer, devices["model.embed_tokens"], base.dtype, base.location)


def adapters(base: BaseModel) -> list[LoraAdapter]:
    """Three adapters that change every layer, the head too."""
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    def modules() -> dict[str, LoraModule]:
        shapes = {name: shape_of(layer) for name, layer in linear_modules(base.model).items()}
        return {name: LoraModule(factor(2, inner), factor(outer, 2), 1.0) for name, (outer, inner) in shapes.items()}

    return [LoraAdapter(f"a{i}", modules()) for i in range(3)]


def answers(base: BaseModel, attached: list[LoraAdapter]) -> dict[str, Any]:
    """What rows and mixtures answer and how they score; the last without adapters."""
    settings = GenerationSettings(max_new_tokens=8)
    weights = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.7]])
    dense = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    lora = MultiLora(base.model)
    lora.load(attached)
    choices = {"rows": [0, 2, -1, 1], "in order": [0, 0, 1, 1], "apart": weights, "dense": dense}
    said = {name: generate(base, lora, PROMPTS, choice, settings) for name, choice in choices.items()}
    scored = {name: score_references(base, lora, PROMPTS, PROMPTS, choice) for name, choice in choices.items()}
    lora.detach()
    scored["base"] = score_references(base, None, PROMPTS, PROMPTS, None)
    return {"answers": said, "scores": scored}


def trained(base: BaseModel, settings: TrainingSettings) -> dict[str, Any]:
    """Losses of two adapters trained at once, and the sum of all their factors' sizes."""
    groups = [TrainingGroup("a", (("w1", "w2 w3"), ("w4", "w5"))), TrainingGroup("b", (("w6", "w7"), ("w8", "w9 w1")))]
    results = train(base, groups, settings)
    return {
        "losses": [list(result.losses) for result in results],
        "sizes": [sum(float(m.delta().norm()) for m in r.adapter.modules.values()) for r in results],
    }


def weighed(base: BaseModel, attached: list[LoraAdapter]) -> dict[str, Any]:
    """The loss of groups with weighted adapters, and the gradients of weights and of factors on both devices."""
    weights = torch.tensor([[0.5, -0.3], [1.2, 0.8]], requires_grad=True)
    factors = {f"model.layers.{i}.mlp.up_proj": torch.tensor(0.7, requires_grad=True) for i in range(2)}
    lora = MultiLora(base.model)
    lora.load(attached)
    with lora.weighted(torch.tensor([[0, 2], [1, -1]]), weights, factors):
        logits = base.model(input_ids=torch.arange(3, 23).view(4, 5).to(base.device)).logits
        loss = logits.to("cpu").logsumexp(2).sum()
        loss.backward()
    lora.detach()
    learned = [weights, *factors.values()]
    return {"loss": float(loss.detach()), "gradients": [x for t in learned for x in t.grad.flatten().tolist()]}


def main(location: str) -> None:
    _setup_privateuseone_for_python_backend(KIND)  # before autograd counts the devices, at its first backward pass
    settings = TrainingSettings(rank=2, epochs=3, learning_rate=1e-2)
    attached = adapters(load_base(location))

    plain = {**answers(load_base(location), attached), **trained(load_base(location), settings)}
    plain["weighted"] = weighed(load_base(location), attached)
    torch.inference_mode = torch.no_grad  # type: ignore[assignment]  # wrapped tensors have no inference tensors
    first, second, cpu = torch.device(KIND, 0), torch.device(KIND, 1), torch.device("cpu")

    def placed(last: torch.device, head: torch.device) -> BaseModel:
        begin = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), first)
        return spread(load_base(location), {**begin, "model.layers.1": last, "model.norm": last, "lm_head": head})

    with Pair(), Literals():
        found = {
            "plain": plain,
            "head with the last layer": answers(placed(second, second), attached),
            "head with the embedding": answers(placed(second, first), attached),
            # Autograd knows one device of a kind: here the CPU is the other one.
            "training": trained(placed(cpu, first), settings),
            "weighted": weighed(placed(cpu, first), attached),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
