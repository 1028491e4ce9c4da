"""The frozen backbone: where weights come from, that they are the right ones, and that nothing moves them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ssn.backbone import (
    Backbone,
    apply_calibration,
    backbone_state,
    calibrate,
    calibration_state,
    load_backbone,
    restore_backbone,
)
from ssn.config import ModelConfig
from ssn.errors import SSNError
from tests.tolerances import FLOAT32_ATOL, FLOAT32_RTOL

RESNET = ModelConfig(backbone="resnet18.tv_in1k", weights="random")


def _images(num: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(num, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def _assert_same_features(a: Backbone, b: Backbone, image_size: int = 64) -> None:
    x_BCHW = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    for ours, expected in zip(a(x_BCHW), b(x_BCHW), strict=True):
        assert torch.equal(ours, expected)


@pytest.fixture(scope="module")
def whole_resnet18() -> dict[str, Tensor]:
    """State dict of a whole classifier, as published weights files hold it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return timm.create_model("resnet18", pretrained=False).state_dict()


def test_features_are_the_layers_asked_for_finest_first() -> None:
    backbone = load_backbone(replace(RESNET, layers=(1, 2, 3)))
    assert backbone.name == "resnet18.tv_in1k"
    assert backbone.channels == (64, 128, 256)
    assert [tuple(m.shape) for m in backbone(_images())] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4)]


def test_the_backbone_is_frozen_in_eval_mode() -> None:
    backbone = load_backbone(RESNET)
    nn.Sequential(backbone).train()
    assert not any(m.training for m in backbone.net.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    before = backbone.digest
    backbone(_images())
    backbone.update_digest()
    assert backbone.digest == before


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load_backbone(RESNET, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert load_backbone(RESNET, seed=5).digest == first.digest
    assert load_backbone(RESNET, seed=6).digest != first.digest


def test_random_weights_have_no_closed_branches() -> None:
    norms = [m for m in load_backbone(RESNET).net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 15
    assert all(norm.weight.all() for norm in norms)


def test_digest_covers_names_dtypes_shapes_and_bytes() -> None:
    backbone = load_backbone(RESNET)
    digests = [backbone.digest]
    changes = [
        lambda net: net.conv1.weight.data[0, 0, 0, 0].add_(1e-3),
        lambda net: setattr(net, "bn1", net.bn1.half()),
        lambda net: setattr(net.conv1, "weight", nn.Parameter(net.conv1.weight.data.reshape(64, 3, 49, 1))),
        lambda net: net.register_buffer("extra", torch.zeros(1)),
    ]
    for change in changes:
        change(backbone.net)
        backbone.update_digest()
        digests.append(backbone.digest)
    assert len(set(digests)) == len(digests)
    assert all(len(d) == 64 for d in digests)


def test_digest_does_not_depend_on_the_count_of_training_steps(
    whole_resnet18: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(whole_resnet18, tmp_path / "a.safetensors")
    counted = {n: t + 7 if n.endswith("num_batches_tracked") else t for n, t in whole_resnet18.items()}
    save_file(counted, tmp_path / "b.safetensors")
    without = {n: t for n, t in whole_resnet18.items() if not n.endswith("num_batches_tracked")}
    save_file(without, tmp_path / "c.safetensors")
    digests = {load_backbone(replace(RESNET, weights=str(tmp_path / f"{n}.safetensors"))).digest for n in "abc"}
    assert len(digests) == 1


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_file_of_the_whole_classifier_is_accepted(
    whole_resnet18: dict[str, Tensor], tmp_path: Path, as_uri: bool
) -> None:
    path = tmp_path / "whole.safetensors"
    save_file(whole_resnet18, path)
    backbone = load_backbone(replace(RESNET, weights=path.as_uri() if as_uri else str(path)))
    state = backbone.net.state_dict()
    assert "fc.weight" not in state
    assert torch.equal(state["layer3.1.conv2.weight"], whole_resnet18["layer3.1.conv2.weight"])


def test_a_file_whose_names_are_nested_differently_is_accepted(tmp_path: Path) -> None:
    # timm flattens `stages.0` to `stages_0` when it cuts ConvNeXt into features.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        whole = timm.create_model("convnext_atto", pretrained=False).eval()
    assert "stages.0.blocks.0.conv_dw.weight" in whole.state_dict()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    model = ModelConfig(backbone="convnext_atto", weights=str(tmp_path / "w.safetensors"), layers=(1, 2))
    ours = load_backbone(model)(_images())
    expected = whole.forward_intermediates(_images(), indices=[1, 2], intermediates_only=True)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=FLOAT32_RTOL, atol=FLOAT32_ATOL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer2.0.bn1.running_var"), "tensor 'layer2.0.bn1.running_var' of .* is missing"),
        (lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}), r"conv1.weight has shape \[64, 1, 7, 7\]"),
        (
            lambda s: s.update({"layer2.2.conv1.weight": torch.zeros(1)}),
            "resnet18.tv_in1k has no tensor 'layer2.2.conv1.weight'; these are another",
        ),
    ],
)
def test_another_models_weights_are_refused(
    whole_resnet18: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    state = dict(whole_resnet18)
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SSNError, match=rf"w\.safetensors: {message}"):
        load_backbone(replace(RESNET, weights=str(tmp_path / "w.safetensors")))


def test_a_larger_model_of_the_same_family_is_refused(tmp_path: Path) -> None:
    # ResNet34 has every tensor of ResNet18, of the same shape.
    save_file(timm.create_model("resnet34", pretrained=False).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(SSNError, match=r"has no tensor 'layer1\.2\."):
        load_backbone(replace(RESNET, weights=str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet81"}, "'resnet81' is not a timm model; did you mean 'resnet"),
        ({"backbone": "resnet81", "weights": "timm"}, "'resnet81' is not a timm model; did you mean 'resnet"),
        ({"backbone": "resnet18.tv_in1kk"}, "Invalid pretrained tag"),
        ({"backbone": "resnet18.tv_in1kk", "weights": "timm"}, "did you mean 'resnet18.tv_in1k'"),
        ({"layers": (2, 9)}, r"model\.layers \[2, 9\]"),
        ({"weights": "nowhere.safetensors"}, r"cannot read model\.weights 'nowhere\.safetensors'.*No such file"),
    ],
)
def test_mistakes_are_one_line_with_a_way_out(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SSNError, match=message) as caught:
        load_backbone(replace(RESNET, **changes))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"PK\x03\x04" + b"\xff" * 64)
    with pytest.raises(SSNError, match=r"w\.pth' is not a safetensors file"):
        load_backbone(replace(RESNET, weights=str(tmp_path / "w.pth")))


def test_shipped_reference_weights_load(shared_dir: Path) -> None:
    path = shared_dir / "weights" / "resnet18.tv_in1k.layer1-3.safetensors"
    backbone = load_backbone(replace(RESNET, weights=str(path)))
    fine, coarse = backbone(_images())
    assert fine.shape == (2, 128, 8, 8)
    assert coarse.shape == (2, 256, 4, 4)
    assert 0 < float(fine.mean()) < 10


def _point_hub_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool = False) -> None:
    # As HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE do, had they been set before the import.
    constants = huggingface_hub.constants
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@pytest.mark.parametrize(("offline", "reason"), [(False, "Connection refused"), (True, "offline mode is enabled")])
def test_an_unreachable_hub_is_reported_without_retries(
    offline: bool, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _point_hub_at("http://127.0.0.1:9", tmp_path, monkeypatch, offline=offline)

    def no_sleep(duration_s: float) -> None:
        raise AssertionError(f"slept {duration_s} s before a retry")

    monkeypatch.setattr("time.sleep", no_sleep)
    with pytest.raises(SSNError, match=rf"cannot fetch the weights of 'resnet18\.tv_in1k'.*{reason}") as caught:
        load_backbone(replace(RESNET, weights="timm"))
    assert "--set model.weights=PATH_OR_URI" in str(caught.value)
    assert "--set model.weights=random" in str(caught.value)
    assert "\n" not in str(caught.value)


class _Hub(BaseHTTPRequestHandler):
    """Enough of the Hugging Face hub to serve one file."""

    content = b""
    requests: list[str] = []  # noqa: RUF012

    def _respond(self, body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        if body:
            self.wfile.write(self.content)

    def do_HEAD(self) -> None:
        self._respond(body=False)

    def do_GET(self) -> None:
        self._respond(body=True)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(whole_resnet18: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[_Hub]]:
    _Hub.content = save(whole_resnet18)
    _Hub.requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        _point_hub_at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield _Hub
        server.shutdown()
        thread.join()


def test_hub_weights_are_fetched_once_and_then_cached(hub: type[_Hub], whole_resnet18: dict[str, Tensor]) -> None:
    first = load_backbone(replace(RESNET, weights="timm"))
    assert torch.equal(first.net.state_dict()["layer3.1.conv2.weight"], whole_resnet18["layer3.1.conv2.weight"])
    assert "GET /timm/resnet18.tv_in1k/resolve/main/model.safetensors" in hub.requests
    hub.requests.clear()
    assert load_backbone(replace(RESNET, weights="timm")).digest == first.digest
    assert hub.requests == []


def test_weights_that_timm_keeps_at_a_plain_url_are_fetched(
    whole_resnet18: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.save(whole_resnet18, tmp_path / "published.pth")
    cfg = replace(
        timm.get_pretrained_cfg("resnet18.tv_in1k"), hf_hub_id=None, url=(tmp_path / "published.pth").as_uri()
    )
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: cfg)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    backbone = load_backbone(replace(RESNET, weights="timm"))
    assert torch.equal(backbone.net.state_dict()["layer3.1.conv2.weight"], whole_resnet18["layer3.1.conv2.weight"])
    (tmp_path / "published.pth").unlink()
    assert load_backbone(replace(RESNET, weights="timm")).digest == backbone.digest
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(
        SSNError, match=r"cannot fetch the weights of 'resnet18\.tv_in1k' from file:.*model\.weights=random"
    ):
        load_backbone(replace(RESNET, weights="timm"))


def test_a_damaged_file_in_the_cache_is_reported(hub: type[_Hub]) -> None:
    hub.content = hub.content[:1000]
    with pytest.raises(SSNError, match=r"timm cannot build .*or delete .*model\.safetensors if it is damaged"):
        load_backbone(replace(RESNET, weights="timm"))


def test_a_saved_backbone_is_restored() -> None:
    backbone = load_backbone(RESNET, seed=8)
    calibrate(backbone, [_images()])
    restored = restore_backbone(RESNET, backbone_state(backbone))
    assert restored.digest == backbone.digest
    _assert_same_features(restored, backbone)
    with pytest.raises(SSNError, match="the saved backbone"):
        restore_backbone(replace(RESNET, backbone="resnet50"), backbone_state(backbone))


def test_calibration_averages_the_statistics_of_all_batches() -> None:
    backbone = load_backbone(RESNET, seed=9)
    before, momentum = backbone.digest, backbone.net.bn1.momentum
    batches = [_images(2, seed=1), _images(3, seed=2) * 2 + 1]
    stem = [backbone.net.conv1(x_BCHW) for x_BCHW in batches]
    calibrate(backbone, iter(batches))
    norm = backbone.net.bn1
    torch.testing.assert_close(
        norm.running_mean, torch.stack([s.mean(dim=(0, 2, 3)) for s in stem]).mean(dim=0), rtol=1e-4, atol=FLOAT32_ATOL
    )
    torch.testing.assert_close(norm.running_var, torch.stack([s.var(dim=(0, 2, 3)) for s in stem]).mean(dim=0))
    assert not any(m.training for m in backbone.net.modules())
    assert norm.momentum == momentum
    assert backbone.digest != before
    again = load_backbone(RESNET, seed=9)
    calibrate(again, batches)
    assert again.digest == backbone.digest


def test_saved_calibration_statistics_are_applied_bit_for_bit() -> None:
    calibrated, fresh = load_backbone(RESNET, seed=11), load_backbone(RESNET, seed=11)
    calibrate(calibrated, [_images()])
    assert fresh.digest != calibrated.digest
    apply_calibration(fresh, calibration_state(calibrated))
    assert fresh.digest == calibrated.digest


def test_calibration_gives_deep_features_the_scale_of_shallow_ones() -> None:
    backbone = load_backbone(replace(RESNET, layers=(1, 2, 3, 4)), seed=10)
    calibrate(backbone, [_images(8)])
    deviations = [float(m.std()) for m in backbone(_images(8))]
    assert all(0.2 < d < 5 for d in deviations)


def test_calibration_without_batch_norms_changes_nothing() -> None:
    backbone = load_backbone(ModelConfig(backbone="convnext_atto", weights="random", layers=(1, 2)))
    before = backbone.digest
    calibrate(backbone, [_images()])
    backbone.update_digest()
    assert backbone.digest == before


def test_calibration_without_images_is_a_bug() -> None:
    backbone = load_backbone(RESNET)
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(backbone, [])
    assert not any(m.training for m in backbone.net.modules())


def test_channels_last_models_are_turned_to_nchw() -> None:
    class Net(nn.Module):
        output_fmt = timm.layers.Format("NHWC")

        def forward(self, x_BCHW: Tensor) -> list[Tensor]:
            return [x_BCHW.permute(0, 2, 3, 1)]

    (features,) = Backbone(Net(), "net", (3,))(_images())
    assert torch.equal(features, _images())
