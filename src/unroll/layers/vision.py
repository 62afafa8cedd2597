"""What models see with: pictures to a grid of vectors and one vector of the whole.

Papers: He et al. 2016, arXiv:1512.03385 (residual blocks); Wu & He 2018, 1803.08494 (group normalisation: no batch
statistics, so a picture's features depend neither on its neighbours nor on the number of workers); Dosovitskiy et al.
2021, 2010.11929 (a stem of patches); Liu et al. 2018, 1807.03247 (coordinates beside the features); Long et al. 2015,
1411.4038 (transposed convolutions that bring a grid back to the picture's size).

    stem      s x s patches, side by side, through one matrix
    block     x <- relu(S(x) + N(C(relu(N(C(x))))))    C: 3 x 3 convolution, N: group normalisation, S: identity, or a
              1 x 1 convolution where the width changes; every stage but the first halves the side
    grid_p    = W [features_p ; x_p ; y_p]             x, y in [-1, 1]: where the region is, which convolutions do not say
    vector    = mean_p relu(grid_p)

With `colour: beside` the network sees the least and the largest of R, G and B of each pixel, which say nothing of hue, and
the colour of a region is told like its place: its mean differences R - Y and B - Y from brightness stand beside its
features. A shape is then the same whatever its colour, where a network that sees both at once learns the shapes of each
colour, and takes the pink circle, if it has seen none, for a pink square. `strongest` tells, in the place of the mean, that of
the pixel of a region that is furthest from grey, four times as large: a thing that fills a corner of its region has its
colour all the same, and is not paler than one that fills it.

A picture of 64 x 64 with a stem of 4 and two stages gives a grid of 8 x 8 regions, row by row. Forward and backward of
64 such pictures, widths 48 and 96, take 51 ms in bf16 on one core with AMX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from unroll.config import Strict
from unroll.errors import UserError
from unroll.layers.dropout import Dropout, draw_integers, draw_mask


class VisionOptions(Strict):
    """`widths` of the stages, `blocks` in each, `stem`: side of a patch, `groups` of the normalisation.

    stored: the data set holds features of so many channels in the place of pictures (preparer caption_features).
    pretrained: name of a model of Hugging Face `transformers` that stands in for the network of our own.
    tuned: what training changes: `all`, the `last` stage, or `none`. What is not tuned is computed without gradients.
    colour: `mixed`, or `beside` what the network makes of a picture without hues, or so the `strongest`, see above.
    grey, grey_contrast: in training the network sees brightness alone of this share of the pictures, whose differences from
    their mean are multiplied by a factor between 1 - c and 1 + c; their colours are told all the same. Grey pictures of
    `data/media.py` have none to tell: what is black on a shape that training lacks in black looks like one of them.
    dropout: of what the encoder gives, the same channels for all regions or frames. blind: the picture is not looked at;
    a grid that is learnt stands in its place, the same for every picture: what is left is what words alone predict.
    """

    widths: list[int] = Field([32, 64, 128], min_length=1)
    blocks: int = Field(1, ge=1)
    stem: int = Field(4, ge=1)
    groups: int = Field(8, ge=1)
    pretrained: str | None = None
    stored: int | None = Field(None, ge=1)
    tuned: Literal["all", "last", "none"] = "all"
    colour: Literal["mixed", "beside", "strongest"] = "mixed"
    grey: float = Field(0.0, ge=0.0, lt=1.0)
    grey_contrast: float = Field(0.0, ge=0.0, le=1.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    blind: bool = False

    @model_validator(mode="after")
    def own_network(self) -> Self:
        if self.colour != "mixed" and (self.stored or self.pretrained):
            raise ValueError(
                f"colour: {self.colour} is for the network of our own, neither for stored features nor for pretrained"
            )
        if self.grey and self.colour == "mixed":
            raise ValueError("grey: leaves no colour to tell with colour mixed; use beside or strongest")
        return self

    @model_validator(mode="after")
    def groups_divide(self) -> Self:
        wrong = [width for width in self.widths if width < 1 or width % self.groups]
        if wrong:
            raise ValueError(f"widths: found {wrong[0]}, every width must be a multiple of groups ({self.groups})")
        return self


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a way around them: [B,C,H,W] -> [B,C',H/stride,W/stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm_first, self.norm_second = nn.GroupNorm(groups, outputs), nn.GroupNorm(groups, outputs)
        same = stride == 1 and inputs == outputs
        self.around = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = F.relu(self.norm_first(self.first(inputs)))
        return F.relu(self.around(inputs) + self.norm_second(self.second(inner)))


class ResidualNetwork(nn.Module):
    """A stem and stages of residual blocks: pictures [B,3,H,W], without hues [B,2,H,W] -> features [B,C,H',W']."""

    def __init__(self, options: VisionOptions) -> None:
        super().__init__()
        widths, stem = options.widths, options.stem
        self.stem = nn.Conv2d(3 if options.colour == "mixed" else 2, widths[0], stem, stem)
        self.stages = nn.ModuleList()
        for number, width in enumerate(widths):
            before, stride = (widths[max(0, number - 1)], 1 if number == 0 else 2)
            blocks = [ResidualBlock(before, width, stride, options.groups)]
            blocks += [ResidualBlock(width, width, 1, options.groups) for _ in range(options.blocks - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.outputs = widths[-1]

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures in [-1, 1], laid out as they come, channels last, which is what the kernels like."""
        features = self.stem(pictures)
        for stage in self.stages:
            features = stage(features)
        return features

    def last_stage(self) -> nn.Module:
        """The part that `tuned: last` trains."""
        return self.stages[-1]


class PretrainedNetwork(nn.Module):
    """An image model of `transformers` by name: pictures [B,3,H,W] in [-1, 1] -> features [B,C,H',W']."""

    MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which such models were trained on

    def __init__(self, name: str) -> None:
        """Raises UserError without the package, or where the weights are not at hand: nothing is downloaded here."""
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError:
            raise UserError(f"encoder.pretrained {name}: needs a package: pip install 'unroll[vision]'") from None
        try:
            self.network = AutoModel.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"encoder.pretrained: the weights of {name!r} are not on this machine ({reason}); "
                f"fetch them once with `hf download {name}`, or leave pretrained out"
            ) from None
        sizes = getattr(self.network.config, "hidden_sizes", None)
        self.outputs = int(sizes[-1] if sizes else self.network.config.hidden_size)
        self.register_buffer("mean", torch.tensor(self.MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(self.DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        inputs = ((pictures + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("deviation")
        features: Tensor = self.network(pixel_values=inputs).last_hidden_state
        if features.dim() == 3:  # patches of a transformer, after a token for the whole picture: [B,1+P,C]
            side = int((features.shape[1] - 1) ** 0.5)
            features = features[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        return features

    def train(self, mode: bool = True) -> Self:
        """Always as in evaluation: batch statistics would make a picture's features depend on its neighbours."""
        return super().train(False)

    def last_stage(self) -> nn.Module:
        """The part that `tuned: last` trains."""
        parts = [m for m in self.network.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        if not parts:
            raise UserError("encoder.tuned last: this pretrained model has no list of stages; use all or none")
        return parts[0][-1]


class Vision(nn.Module):
    """The encoder of pictures that captioners share: uint8 [B,H,W,3], or stored features [B,C,h,w] -> grid [B,P,D];
    `vector` makes [B,D] of it.

    `dropout` is the model's to apply, to a grid [B,P,D] or the frames of a clip [B,F,D]: it alone knows what a row is.
    """

    def __init__(self, options: VisionOptions, width: int) -> None:
        super().__init__()
        self.options, self.width = options, width
        self.dropout = Dropout(options.dropout, shared_over_time=True)
        if options.blind:
            self.nothing = nn.Parameter(torch.randn(BLIND_REGIONS, width) * 0.1)  # [P,D]
            return
        if options.stored:
            self.project = nn.Linear(options.stored + 2, width)
            return
        self.network: ResidualNetwork | PretrainedNetwork
        self.network = PretrainedNetwork(options.pretrained) if options.pretrained else ResidualNetwork(options)
        told = 2 if options.colour == "mixed" else 4  # place, and colour
        self.project = nn.Linear(self.network.outputs + told, width)
        if options.tuned != "all":
            self.network.requires_grad_(False)
        if options.tuned == "last":
            self.network.last_stage().requires_grad_(True)

    def forward(self, pictures: Tensor, each: int = 1) -> Tensor:
        """The grid, row by row: [B,P,D]. `each`: so many pictures, one after the other, are of one row of the batch."""
        if self.options.blind:
            return self.nothing.expand(len(pictures), -1, -1)
        features = self.features(pictures, each)  # [B,C,h,w]
        rows, _, height, width = features.shape
        regions = features.flatten(2).transpose(1, 2)  # [B,P,C]
        places = coordinates(height, width, regions).expand(rows, -1, -1)  # [B,P,2]
        told = [regions, places]
        if self.options.colour != "mixed":
            strongest = self.options.colour == "strongest"
            told.append(colours(pictures, height, width, strongest).to(regions.dtype))
        grid: Tensor = self.project(torch.cat(told, -1))
        return grid

    def features(self, pictures: Tensor, each: int = 1) -> Tensor:
        """Of the network alone: uint8 [B,H,W,3] -> [B,C,h,w]; stored features pass.

        Raises:
            UserError: features where pictures are expected, or the other way round.
        """
        like = self.project.weight
        stored = pictures.shape[1] if pictures.is_floating_point() else None
        if stored != self.options.stored:
            held = "pictures" if stored is None else f"features of {stored} channels"
            raise UserError(f"encoder.stored: found {self.options.stored}, the data set holds {held}")
        if stored is not None:
            return pictures.to(like.dtype)
        shown = pictures if self.options.colour == "mixed" else without_hue(pictures)
        if self.training and self.options.grey:
            shown = self._some_grey(pictures, shown, each)
        inputs = (shown.to(like.dtype) / 127.5 - 1).permute(0, 3, 1, 2)  # [B,3,H,W] or [B,2,H,W]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.options.tuned != "none"):
            features: Tensor = self.network(inputs)
        return features

    def _some_grey(self, pictures: Tensor, shown: Tensor, each: int) -> Tensor:
        """What is shown [B,H,W,2] of pictures [B,H,W,3], brightness alone of some: float [B,H,W,2]."""
        rows, device = len(pictures) // each, pictures.device
        seen_grey = draw_mask((rows,), self.options.grey, True, device, torch.float32) == 0  # [rows]
        drawn = draw_integers((rows,), 65536, device) / 65535  # in [0, 1]
        factor = 1 + self.options.grey_contrast * (2 * drawn - 1)
        seen_grey, factor = (x.repeat_interleave(each).view(-1, 1, 1) for x in (seen_grey, factor))  # [B,1,1]
        light = brightness(pictures)[..., 0]  # [B,H,W]
        mean = light.mean((1, 2), keepdim=True)
        light = (mean + factor * (light - mean)).clamp(0, 255)
        return torch.where(seen_grey[..., None], light[..., None], shown)

    def vector(self, grid: Tensor) -> Tensor:
        """The whole picture from its grid: [B,P,D] -> [B,D]."""
        return F.relu(grid).mean(1)


BLIND_REGIONS = 4
"""Regions of the grid that stands for the picture of a blind model."""


def coordinates(height: int, width: int, like: Tensor) -> Tensor:
    """x and y in [-1, 1] of the middle of every region, row by row: [P,2]."""
    y, x = (
        (torch.arange(n, device=like.device, dtype=like.dtype) * 2 + 1) / n - 1 for n in (height, width)
    )  # [h], [w]
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)


def without_hue(pictures: Tensor) -> Tensor:
    """The least and the largest of R, G and B, the whiteness and blackness of a colour (Smith & Lyons 1996, HWB):
    uint8 [B,H,W,3] -> uint8 [B,H,W,2]."""
    return torch.stack([pictures.amin(-1), pictures.amax(-1)], -1)


def colours(pictures: Tensor, height: int, width: int, strongest: bool = False) -> Tensor:
    """R - Y and B - Y of every region of a grid, row by row: uint8 [B,H,W,3] -> [B,P,2]. Their mean, within [-1, 1], or
    four times those of the pixel where they are `strongest`."""
    differences = ((pictures[..., ::2] - brightness(pictures)) / 255).permute(0, 3, 1, 2)  # [B,2,H,W]
    if not strongest:
        return F.adaptive_avg_pool2d(differences, (height, width)).flatten(2).transpose(1, 2)
    strength = differences.square().sum(1)  # [B,H,W]
    _, places = F.adaptive_max_pool2d(strength, (height, width), return_indices=True)  # [B,h,w]
    chosen = places.flatten(1)[..., None].expand(-1, -1, 2)  # [B,P,2]
    return 4 * differences.flatten(2).transpose(1, 2).gather(1, chosen)


def brightness(pictures: Tensor) -> Tensor:
    """Y of ITU-R BT.601: uint8 [B,H,W,3] -> float [B,H,W,1]."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)
    return (pictures * weights).sum(-1, keepdim=True)  # no matrix product, which mixed precision would round


class DenseOutput(nn.Module):
    """Fully convolutional output: a grid back to the picture's size, one vector of scores for every pixel.

    A 1 x 1 convolution, then a transposed one that enlarges by `factor`, set up as bilinear interpolation.
    """

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.score = nn.Conv2d(inputs, outputs, 1)
        kernel, padding = 2 * factor - factor % 2, factor // 2
        self.enlarge = nn.ConvTranspose2d(outputs, outputs, kernel, factor, padding, groups=outputs, bias=False)
        middle = factor - 1 if kernel % 2 else factor - 0.5
        line = 1 - (torch.arange(kernel) - middle).abs() / factor  # [k]
        with torch.no_grad():
            self.enlarge.weight.copy_(line[:, None] * line)

    def forward(self, features: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h factor,w factor]."""
        enlarged: Tensor = self.enlarge(self.score(features))
        return enlarged


def seen(inputs: Mapping[str, Tensor], kind: str) -> Tensor:
    """What a model looks at, `image` [B,H,W,3] or `frames` [B,F,H,W,3].

    Raises:
        UserError: the data set has the other kind.
    """
    if kind not in inputs:
        raise UserError(f"this model reads {kind}, the data set gives {', '.join(sorted(inputs))}; use another model")
    return inputs[kind]
