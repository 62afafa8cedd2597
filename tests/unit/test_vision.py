"""The encoder of pictures: its shapes, what is tuned, transposed convolution as the adjoint, pretrained names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unroll.config import check
from unroll.errors import UserError
from unroll.layers.dropout import dropout_place
from unroll.layers.vision import BLIND_REGIONS, DenseOutput, Vision, VisionOptions, colours, coordinates, seen


def pictures(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def options(**changes: Any) -> VisionOptions:
    return VisionOptions(**{"widths": [8, 16], "groups": 4, **changes})


def test_a_grid_row_by_row_and_its_vector() -> None:
    vision = Vision(options(blocks=2), 10)
    grid = vision(pictures())
    assert grid.shape == (2, 16, 10)
    torch.testing.assert_close(vision.vector(grid), grid.clamp_min(0).mean(1))
    expected = torch.tensor([[-2 / 3, -0.5], [0, -0.5], [2 / 3, -0.5], [-2 / 3, 0.5]])
    torch.testing.assert_close(coordinates(2, 3, grid)[:4], expected)


def test_a_region_sees_what_is_where_it_is() -> None:
    vision, picture = Vision(options(widths=[8], stem=4), 6), pictures(1)
    changed = picture.clone()
    changed[0, 24:, :8] = 0  # the lower left corner: grid rows 6 and 7, columns 0 and 1
    moved = (vision(picture) - vision(changed)).abs().sum(-1).view(8, 8)
    assert moved[6:, :2].min() > 3 * moved[:4, 4:].max()  # what is left there comes through the normalisation


@torch.no_grad()
def test_with_colour_beside_the_network_sees_no_hue() -> None:
    torch.manual_seed(1)
    vision = Vision(options(widths=[8], stem=4, colour="beside"), 6).eval()
    picture = pictures(1)
    turned = picture[..., [1, 2, 0]]
    assert torch.equal(vision.features(picture), vision.features(turned))
    assert float((vision(picture) - vision(turned)).abs().max()) > 0.01  # the colour is told
    red = torch.tensor([200, 60, 60], dtype=torch.uint8).expand(1, 16, 16, 3)
    found = colours(red, 4, 4)
    assert found.shape == (1, 16, 2)
    brightness = 0.299 * 200 + 0.701 * 60
    assert found[0, 5].tolist() == pytest.approx([(200 - brightness) / 255, (60 - brightness) / 255], abs=1e-5)


def test_the_strongest_colour_of_a_region_is_told_whatever_surrounds_it() -> None:
    """A thing in a corner of its region is as red as one that fills it; the mean says it is paler."""
    filled = torch.full((1, 16, 16, 3), 210, dtype=torch.uint8)
    corner = filled.clone()
    red = torch.tensor([200, 60, 60], dtype=torch.uint8)
    filled[:, 4:8, 8:12], corner[:, 7, 8] = red, red  # region 1, 2 of 4 x 4
    one, other = colours(filled, 4, 4, strongest=True), colours(corner, 4, 4, strongest=True)
    assert torch.equal(one, other)
    assert one.nonzero()[:, 1].unique().tolist() == [6]
    brightness = 0.299 * 200 + 0.701 * 60
    assert one[0, 6].tolist() == pytest.approx([4 * (200 - brightness) / 255, 4 * (60 - brightness) / 255], abs=1e-5)
    assert not torch.equal(colours(filled, 4, 4), colours(corner, 4, 4))


def test_the_network_sees_some_pictures_grey_and_is_told_their_colours() -> None:
    """The same ones for any number of workers, all frames of a clip alike, and none when it predicts."""
    torch.manual_seed(1)
    vision = Vision(options(widths=[8], stem=4, colour="strongest", grey=0.5, grey_contrast=0.5), 6)
    given, seen = pictures(12), []
    vision.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with dropout_place(1, 7, 0, 6):
        whole = vision(given, 2)
    with dropout_place(1, 7, 2, 6):
        part = vision(given[4:8], 2)
    torch.testing.assert_close(part, whole[4:8])
    grey = (seen[0][:, 0] == seen[0][:, 1]).flatten(1).all(1)  # [B]
    assert torch.equal(grey[::2], grey[1::2])
    assert 0 < int(grey.sum()) < 12
    one = int(grey.nonzero()[0])
    with dropout_place(1, 7, 0, 6):
        turned = vision(given.index_copy(0, torch.tensor([one]), given[one : one + 1, :, :, [2, 1, 0]]), 2)
    assert not torch.allclose(turned[one], whole[one])
    vision.eval()
    assert torch.equal(vision.features(given), vision.features(given[..., [1, 2, 0]]))
    vision(given)
    assert not (seen[-1][:, 0] == seen[-1][:, 1]).flatten(1).all(1).any()


@pytest.mark.parametrize("tuned", ["all", "last", "none"])
def test_what_is_tuned(tuned: str) -> None:
    vision = Vision(options(tuned=tuned), 6)
    vision(pictures()).sum().backward()
    learns = {name for name, parameter in vision.named_parameters() if parameter.grad is not None}
    stages = {name.split(".")[2] for name in learns if name.startswith("network.stages")}
    assert "project.weight" in learns
    assert ("network.stem.weight" in learns) == (tuned == "all")
    assert stages == {"all": {"0", "1"}, "last": {"1"}, "none": set()}[tuned]


def test_a_blind_encoder_gives_every_picture_the_same() -> None:
    vision = Vision(options(blind=True), 6)
    grid = vision(pictures(3))
    assert grid.shape == (3, BLIND_REGIONS, 6)
    assert torch.equal(grid[0], grid[2])
    assert [name for name, _ in vision.named_parameters()] == ["nothing"]


def test_transposed_convolution_is_the_adjoint_of_convolution() -> None:
    """<C x, y> = <x, C' y>, where C is the convolution with the same weights, stride and padding."""
    enlarge = DenseOutput(3, 3, 4).double().enlarge
    torch.nn.init.normal_(enlarge.weight)
    x = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    small = F.conv2d(x, enlarge.weight, None, enlarge.stride, enlarge.padding, groups=3)
    y = torch.randn_like(small)
    torch.testing.assert_close((small * y).sum(), (x * enlarge(y)).sum())


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_dense_output_begins_as_bilinear_interpolation(factor: int) -> None:
    dense, inputs = DenseOutput(1, 1, factor), torch.rand(1, 1, 6, 5)
    torch.nn.init.ones_(dense.score.weight)
    torch.nn.init.zeros_(dense.score.bias)
    found, expected = dense(inputs), F.interpolate(inputs, scale_factor=factor, mode="bilinear")
    assert found.shape == expected.shape
    inside = slice(factor, -factor)  # at the rim interpolation repeats the last value, convolution sees zeros
    torch.testing.assert_close(found[..., inside, inside], expected[..., inside, inside])


def test_a_pretrained_encoder_needs_package_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"microsoft/resnet-50.*pip install"):
        Vision(options(pretrained="microsoft/resnet-50"), 6)

    class Absent:
        @staticmethod
        def from_pretrained(name: str, local_files_only: bool) -> None:
            raise OSError("not in the cache\nmore")

    fake = ModuleType("transformers")
    fake.AutoModel = Absent  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(UserError, match=r"microsoft/resnet-50.*not in the cache\); fetch"):
        Vision(options(pretrained="microsoft/resnet-50"), 6)


def test_a_pretrained_encoder_stays_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Sizes", (), {"hidden_sizes": [4, 7]})()
            self.convolution = torch.nn.Conv2d(3, 7, 8, 8)
            self.norm = torch.nn.BatchNorm2d(7)

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return type("Output", (), {"last_hidden_state": self.norm(self.convolution(pixel_values))})()

    class Present:
        @staticmethod
        def from_pretrained(name: str, local_files_only: bool) -> Network:
            assert local_files_only
            return Network()

    fake = ModuleType("transformers")
    fake.AutoModel = Present  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", fake)
    vision = Vision(options(pretrained="some/resnet", tuned="none"), 6).train()
    assert vision(pictures()).shape == (2, 16, 6)
    assert int(vision.network.get_buffer("network.norm.num_batches_tracked")) == 0


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="every width must be a multiple of groups"):
        check(VisionOptions, {"widths": [12]}, "encoder")
    with pytest.raises(UserError, match="reads frames, the data set gives image"):
        seen({"image": pictures()}, "frames")
