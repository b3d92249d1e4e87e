"""The published reductions, to the digit that is printed, without training anything."""

from __future__ import annotations

import published_macs as published
import pytest

# Network, what is asked: (closed form, whole filters where the issue of rounding matters).
EXACT = {
    ("vgg16", "widths of VGG-16-A"): ("34.18", "34.18"),
    ("vgg16", "rate 0.2"): ("35.91", "35.38"),
    ("resnet56", "A: 10 % each"): ("10.40", "10.40"),
    ("resnet56", "B: 60, 30, 10 %"): ("27.56", "27.56"),
    ("resnet110", "A: 50, 0, 0 %"): ("15.86", "15.86"),
    ("resnet110", "B: 50, 40, 30 %"): ("38.66", "38.66"),
    ("ImageNet vgg16", "its widths"): ("77.90", "77.90"),
    ("ImageNet resnet50, stride in the 1x1", "rate 0.3"): ("42.22", None),
    ("ImageNet resnet50, stride in the 1x1", "rate 0.4"): ("53.51", None),
}


@pytest.mark.parametrize(
    "row", [r for r in published.ROWS if (r.network, r.what) in EXACT and r.paper != "ThiNet"],
    ids=lambda row: f"{row.network}, {row.what}",
)  # fmt: skip
def test_published_reductions_are_reached_to_the_digit(row) -> None:
    formula, compact = published.reductions(row)
    expected, whole = EXACT[row.network, row.what]
    assert f"{formula:.2f}" == expected
    assert whole is None or f"{compact:.2f}" == whole


def test_thinets_widths_save_what_they_are_published_to() -> None:
    row = next(r for r in published.ROWS if r.paper == "ThiNet")
    assert [f"{value:.2f}" for value in published.reductions(row)] == ["69.59", "69.59"]


def test_pfecs_skipped_layers_are_named_by_the_number_of_the_convolution() -> None:
    asked = published.first_of_blocks((0.5, 0.4, 0.3), (36, 38, 74), 18)
    whole = [name for name, rate in asked["rates"].items() if rate == 0]
    assert whole == ["layer1.17.conv1", "layer2.0.conv1", "layer3.0.conv1"]
