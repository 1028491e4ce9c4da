"""The frozen feature extractor: any timm model that supports ``features_only``.

Shape legend: B images, C channels, H W position.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from ssn.config import ModelConfig
from ssn.errors import SSNError

HUB_PROBE_TIMEOUT_S = 10.0
# timm has no exception of its own for a model without features_only, an unknown tag, a layer that the model lacks or a
# damaged file in its cache.
_BUILD_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
_OTHER_WEIGHTS = "use `--set model.weights=PATH_OR_URI` or `--set model.weights=random`"


class Backbone(nn.Module):
    """A frozen network from normalised images to one feature map per layer.

    Parameters never require gradients and the module never leaves eval mode: ``train()`` does nothing.

    Attributes:
        name: timm's name of the model.
        channels: Channels of each feature map, in the order ``forward`` returns them.
        digest: SHA-256, in hex, of names, dtypes, shapes and bytes of the state dict in name order.
    """

    def __init__(self, net: nn.Module, name: str, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.name = name
        self.channels = channels
        # An NHWC model (Swin, for one) says so; anything else is NCHW.
        self._channels_last = str(getattr(getattr(net, "output_fmt", None), "value", "NCHW")).upper() == "NHWC"
        self.update_digest()

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Feature maps ``[B, channels[i], H_i, W_i]``, finest first, of images normalised with ImageNet moments."""
        maps = self.net(x_BCHW)
        return tuple(m.permute(0, 3, 1, 2) if self._channels_last else m for m in maps)

    def train(self, mode: bool = True) -> Backbone:
        return self

    def update_digest(self) -> None:
        """Recompute ``digest``; needed only after a change of weights or buffers."""
        with torch.no_grad():
            for norm in _batch_norms(self.net):
                # Counts training steps, which a frozen network never takes: files disagree about it for equal weights.
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.zero_()
        sha = hashlib.sha256()
        for name, tensor in sorted(self.net.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # As bytes: NumPy lacks bfloat16.
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.digest = sha.hexdigest()


def load_backbone(model: ModelConfig, *, seed: int = 0) -> Backbone:
    """Build the backbone of ``model`` and load its weights.

    Args:
        model: ``backbone``, ``layers`` and ``weights``: ``timm`` (hub or its cache), ``random``, or the path or URI of
            a safetensors file. A file may hold the whole classifier; what lies past the last layer used is dropped.
        seed: Of random weights; they do not depend on the global random state, nor change it. Follow with
            :func:`calibrate`.

    Raises:
        SSNError: unknown model or layer, unreachable hub or file, or a file whose tensors are not this model's.
    """
    if model.weights == "timm":
        return _build(model, seed=seed, pretrained_file=_pretrained_file(model.backbone))
    backbone = _build(model, seed=seed)
    if model.weights == "random":
        _open_residual_branches(backbone.net)
    else:
        _load_tensors(backbone.net, _read_safetensors(model.weights), model, source=model.weights)
    backbone.update_digest()
    return backbone


def fold_batch_norms(backbone: Backbone) -> nn.Module:
    """A copy for inference, in which every convolution has the batch norm behind it folded in where that can be told.

    The copy computes the same maps to rounding. Networks without batch norms, and those whose forward pass depends on
    values and cannot be traced, are copied as they are.
    """
    from torch import fx
    from torch.fx.experimental.optimization import fuse

    if not _batch_norms(backbone.net):
        return copy.deepcopy(backbone)
    try:
        net = fuse(backbone.net)
    except fx.proxy.TraceError:
        return copy.deepcopy(backbone)
    return Backbone(net, backbone.name, backbone.channels)


def backbone_state(backbone: Backbone) -> dict[str, Tensor]:
    """Tensors that :func:`restore_backbone` takes, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in backbone.net.state_dict().items()}


def restore_backbone(model: ModelConfig, state: Mapping[str, Tensor]) -> Backbone:
    """Rebuild a backbone from :func:`backbone_state`, without hub or weights file.

    Raises:
        SSNError: ``state`` is not of this model.
    """
    backbone = _build(model, seed=0)
    _load_tensors(backbone.net, state, model, source="the saved backbone")
    backbone.update_digest()
    return backbone


@torch.no_grad()
def calibrate(backbone: Backbone, batches: Iterable[Tensor]) -> None:
    """Set running mean and variance of every batch norm to their averages over ``batches`` of normal images.

    With random weights the initial statistics let activations drift by orders of magnitude with depth; afterwards
    features have the scale that ``synthesis.noise_sigma`` refers to. Updates ``digest``. A backbone without batch norms
    is left as it is.

    Args:
        backbone: Changed in place.
        batches: ``[B, 3, H, W]`` each, normalised, on the backbone's device.

    Raises:
        ValueError: ``batches`` is empty.
    """
    norms = _batch_norms(backbone.net)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    count = 0
    try:
        for x_BCHW in batches:
            backbone(x_BCHW)
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    if count == 0:
        raise ValueError("calibrate needs at least one batch of images")
    backbone.update_digest()


def calibration_state(backbone: Backbone) -> dict[str, Tensor]:
    """What :func:`calibrate` set: the batch norms' statistics by buffer name, on the CPU."""
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in backbone.net.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def apply_calibration(backbone: Backbone, state: Mapping[str, Tensor]) -> None:
    """Set the statistics that :func:`calibration_state` saved, bit for bit; updates ``digest``.

    Raises:
        SSNError: ``state`` is not of this backbone.
    """
    buffers = dict(backbone.net.named_buffers())
    unknown = sorted(set(state) - set(buffers))
    if unknown:
        raise SSNError(f"the saved calibration names {unknown[0]}, which backbone {backbone.name} does not have")
    for name, value in state.items():
        buffers[name].copy_(value)
    backbone.update_digest()


def _batch_norms(net: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]


def _build(model: ModelConfig, *, seed: int, pretrained_file: Path | None = None) -> Backbone:
    import timm

    arguments: dict[str, Any] = {"pretrained": False}
    if pretrained_file is not None:
        arguments = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained_file)}}
    if not timm.is_model(model.backbone.partition(".")[0]):
        raise SSNError(f"model.backbone {model.backbone!r} is not a timm model{_nearest(model.backbone)}")
    # Initialisation draws from the global CPU generator, whatever becomes of the draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            net = timm.create_model(model.backbone, features_only=True, out_indices=model.layers, **arguments)
        except _BUILD_ERRORS as exc:
            damaged = f", or delete {pretrained_file} if it is damaged" if pretrained_file else ""
            raise SSNError(
                f"timm cannot build model.backbone {model.backbone!r} with model.layers {list(model.layers)}: "
                f"{_one_line(exc)}; choose another model or other layers{damaged}"
            ) from exc
    channels = tuple(int(c) for c in net.feature_info.channels())
    return Backbone(net, model.backbone, channels)


def _nearest(name: str) -> str:
    import timm

    names = timm.list_models(pretrained="." in name)
    close = difflib.get_close_matches(name, names, n=1) or difflib.get_close_matches(name.partition(".")[0], names, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `timm.list_models()` names them all"


def _one_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(exc).__name__


def _open_residual_branches(net: nn.Module) -> None:
    # Residual networks start with the last norm of each branch at zero, for the sake of training; frozen there, most of
    # the network would be an identity.
    with torch.no_grad():
        for norm in _batch_norms(net):
            if norm.weight is not None and not norm.weight.any():
                norm.weight.fill_(1.0)


def _pretrained_file(name: str) -> Path:
    """timm's weights file of a model in the local cache, fetched first if it is not there."""
    import timm
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from timm.models._hub import download_cached_file

    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as exc:
        raise SSNError(f"model.backbone {name!r}: {_one_line(exc)}{_nearest(name)}") from exc
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        if not timm.is_model(name.partition(".")[0]):
            raise SSNError(f"model.backbone {name!r} is not a timm model{_nearest(name)}")
        raise SSNError(f"timm has no pretrained weights for {name!r}; {_OTHER_WEIGHTS}")
    if not cfg.hf_hub_id:
        try:
            return Path(download_cached_file(cfg.url))
        except OSError as exc:
            raise _fetch_error(name, cfg.url, exc) from exc
    repo, _, revision = cfg.hf_hub_id.partition("@")
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for filename in names:
        try:
            return Path(hf_hub_download(repo, filename, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    for filename in names:
        try:
            # Downloads retry an unreachable hub for the better part of a minute; this request is made once.
            get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision or None), timeout=HUB_PROBE_TIMEOUT_S)
            return Path(hf_hub_download(repo, filename, revision=revision or None))
        except EntryNotFoundError as exc:
            if isinstance(exc, LocalEntryNotFoundError):
                raise _fetch_error(name, f"the hub ({repo})", exc) from exc
        except Exception as exc:  # the hub's HTTP library, which may change, has its own hierarchy
            raise _fetch_error(name, f"the hub ({repo})", exc) from exc
    raise SSNError(f"{repo} on the Hugging Face hub has no weights file ({', '.join(names)}); {_OTHER_WEIGHTS}")


def _fetch_error(name: str, place: str, exc: Exception) -> SSNError:
    return SSNError(f"cannot fetch the weights of {name!r} from {place}: {_one_line(exc)}; {_OTHER_WEIGHTS}")


def _read_safetensors(source: str) -> dict[str, Tensor]:
    try:
        if "://" in source:
            from ssn.data.storage import open_filesystem

            filesystem, path = open_filesystem(source)
            with filesystem.open_input_file(path) as stream:
                data = stream.read()
        else:
            data = Path(source).expanduser().read_bytes()
    except OSError as exc:
        raise SSNError(f"cannot read model.weights {source!r}: {_one_line(exc)}; {_OTHER_WEIGHTS}") from exc
    try:
        return load_safetensors(data)
    except SafetensorError as exc:
        raise SSNError(f"model.weights {source!r} is not a safetensors file: {_one_line(exc)}; convert it") from exc


def _canonical(name: str) -> str:
    # features_only wraps some models in `model.` and flattens `stages.0` of others to `stages_0`.
    return name.removeprefix("model.").replace(".", "_")


def _load_tensors(net: nn.Module, tensors: Mapping[str, Tensor], model: ModelConfig, *, source: str) -> None:
    own = net.state_dict()
    given = {_canonical(name): (name, tensor) for name, tensor in tensors.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in own.items():
        found = given.pop(_canonical(name), None)
        if found is not None:
            if found[1].shape != tensor.shape:
                raise SSNError(
                    f"{source}: {found[0]} has shape {list(found[1].shape)}, but {model.backbone} needs "
                    f"{list(tensor.shape)}; these are another model's weights"
                )
            state[name] = found[1]
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros_like(tensor)
        else:
            raise SSNError(
                f"{source}: tensor {name!r} of {model.backbone} with layers {list(model.layers)} is missing; "
                "these are another model's weights, or fewer layers'"
            )
    if given:
        _refuse_foreign([name for name, _ in given.values()], model, source)
    net.load_state_dict(state)


def _refuse_foreign(names: list[str], model: ModelConfig, source: str) -> None:
    # A whole classifier has tensors past the last layer used. Anything else beyond the model's own is a sign of another
    # architecture: ResNet34 has every tensor of ResNet18, and more.
    import timm

    with torch.random.fork_rng(devices=[]):
        whole = {_canonical(name) for name in timm.create_model(model.backbone, pretrained=False).state_dict()}
    foreign = sorted(name for name in names if _canonical(name) not in whole)
    if foreign:
        raise SSNError(f"{source}: {model.backbone} has no tensor {foreign[0]!r}; these are another model's weights")
