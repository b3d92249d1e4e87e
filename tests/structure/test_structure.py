"""What a user loses when one of these fails: what of their network can be pruned, and why not."""

from __future__ import annotations

import functools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
from finished import a_run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fpgm
from fpgm.runs import checkpoint
from fpgm.structure.command import main
from fpgm.structure.diagram import drawn
from fpgm.structure.drawing import html
from fpgm.structure.layout import Box, arranged
from fpgm.structure.parts import Structure, take_apart, tried
from fpgm.structure.subject import Subject, find
from fpgm.structure.text import text

OWN = {kind.__name__.lower(): kind for kind in (
    zoo.Odd, zoo.Overwrites, zoo.Spelled, zoo.Mixed, zoo.Mysterious, zoo.Gated, zoo.Functional,
)}  # fmt: skip
SIZES = {"mixed": 8, "spelled": 8, "functional": 16, "odd": 25} | dict.fromkeys(zoo.FAMILIES, 64)
NETWORKS = [*zoo.FAMILIES, *OWN]
# And where that is another network: those with streams.
BOTH = [(name, "independent") for name in NETWORKS]
BOTH += [(name, "shared") for name in (
    "resnet", "resnet20", "bottleneck", "mobilenet_v3", "regnet",
)]  # fmt: skip


@functools.cache
def taken(name: str, residual: str = "independent") -> Structure:
    torch.manual_seed(0)
    model = {**zoo.FAMILIES, **OWN, "resnet20": lambda: fpgm.model("resnet20")}[name]().eval()
    image = (3, SIZES.get(name, 12), SIZES.get(name, 12))
    return take_apart(Subject(name, model, image), image, residual)


def convolutions(structure: Structure) -> set[str]:
    model = structure.graph.module
    named = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    return named | {one.layer for one in structure.whole}


def told(structure: Structure, every: bool) -> list[str]:
    """The words of the text, but for those of a reason, which may name another layer, and of
    code."""
    lines = re.sub(r"(?m):\d+  .*$", "", text(structure, every)).splitlines()
    return re.split(
        r"[\s,]+", "\n".join(line for line in lines if not re.match(r"  [^\s\d]", line))
    )


@pytest.mark.parametrize(("name", "residual"), BOTH)
def test_every_mac_is_in_one_group_or_kept_for_a_reason_or_of_no_convolution(
    name: str, residual: str
) -> None:
    structure = taken(name, residual)
    parts = [b.macs for b in structure.bundles] + [w.macs for w in structure.whole]
    assert sum(map(structure.share, [*parts, *structure.others.values()])) == pytest.approx(100)
    assert sum(layer.macs for layer in structure.dense.layers) == structure.dense.macs


@pytest.mark.parametrize("name", NETWORKS)
def test_text_names_each_convolution_once(name: str) -> None:
    structure = taken(name)
    words = told(structure, every=True)
    # But one whose channels are split is named in each group that decides about some of them.
    groups = Counter(layer for bundle in structure.bundles for layer in bundle.layers)
    times = {layer: groups.get(layer, 1) for layer in convolutions(structure)}
    assert {layer: words.count(layer) for layer in times} == times
    assert name == "shufflenet" or set(times.values()) == {1}


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v3", "shufflenet", "regnet"])
def test_short_text_counts_the_layers_that_it_does_not_name(name: str) -> None:
    structure = taken(name)
    named = convolutions(structure) | set(structure.others)
    more = map(int, re.findall(r"and (\d+) more", text(structure)))
    assert len(named & set(told(structure, every=False))) + sum(more) == len(named)


@pytest.mark.parametrize("name", NETWORKS)
def test_lines_of_code_are_those_that_stand_there(name: str) -> None:
    for one in taken(name).whole:
        if one.place is None:
            assert one.macs == 0  # it is never called
            continue
        lines = Path(one.place.file).read_text().splitlines()
        assert lines[one.place.line - 1].strip() == one.place.code


def test_reason_comes_with_the_line_that_is_the_reason() -> None:
    code = {one.layer: one.place.code for one in taken("mysterious").whole if one.place}
    assert code == {
        "shuffled": "x = x.softmax(1)",
        "twice": "x = self.twice(self.twice(x))",
        "head": "return self.head(x).mean((2, 3))",
    }


def test_layer_called_by_blocks_of_torch_has_the_line_of_the_network() -> None:
    (place,) = {one.place for one in taken("bottleneck").whole}
    assert place is not None
    assert place.code == "identity = self.downsample(x)"
    assert re.fullmatch(r"torchvision/models/resnet\.py:\d+", str(place))


def test_call_in_a_building_block_has_the_line_of_the_network_and_an_operation_its_own() -> None:
    model = zoo.FAMILIES["mobilenet_v3"]().eval()
    gate = "features.4.block.2.fc1"
    kept = take_apart(Subject("it", model, (3, 64, 64)), (3, 64, 64), ignore=[gate]).whole
    (place,) = {one.place for one in kept if one.layer == gate}
    assert place is not None
    assert place.code == "result = self.block(input)"
    places = {one.layer: one.place for one in taken("convnext").whole}
    assert str(places["features.1.0.block.0"]).startswith("torchvision/ops/misc.py:")


@pytest.mark.parametrize(
    ("name", "residual", "layers", "ties"),
    [
        ("gated", "independent", ("a", "gate"), ("product",)),
        ("resnet", "independent", ("layer1.0.conv2",), ()),
        ("resnet", "shared", ("conv1", "layer1.0.conv2", "layer1.1.conv2"), ("add",)),
        ("mobilenet_v2", "independent", ("features.0.0", "features.1.conv.0.0"), ("depthwise",)),
        (
            "mobilenet_v3",
            "independent",
            ("features.4.block.0.0", "features.4.block.1.0", "features.4.block.2.fc2"),
            ("product", "depthwise"),
        ),
    ],
)
def test_group_says_what_makes_it_one(
    name: str, residual: str, layers: tuple[str, ...], ties: tuple[str, ...]
) -> None:
    found = {bundle.layers: bundle.ties for bundle in taken(name, residual).bundles}
    assert found[layers] == ties


@pytest.mark.parametrize(("name", "residual"), BOTH)
def test_groups_of_several_layers_say_why(name: str, residual: str) -> None:
    assert all(bool(b.ties) == (len(b.layers) > 1) for b in taken(name, residual).bundles)


class Itself(nn.Module):
    """A product of what the same filters write, whose layers are one for another reason."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 3, groups=4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return self.fc((x * x.sigmoid()).mean((2, 3)))


def test_what_is_multiplied_by_itself_is_not_tied_by_that() -> None:
    (bundle,) = take_apart(Subject("it", Itself().eval(), (3, 8, 8)), (3, 8, 8)).bundles
    assert (bundle.layers, bundle.ties) == (("a", "b"), ("depthwise",))


def test_rate_comes_to_what_compaction_comes_to() -> None:
    model = fpgm.model("resnet20").eval()
    image = (3, 32, 32)
    structure = tried(take_apart(Subject("it", model, image), image, "shared"), model, 0.25)
    small = fpgm.compact(model, fpgm.select(model, rate=0.25, residual="shared"))
    assert structure.after is not None
    assert structure.after.macs == fpgm.cost(small, image).macs < structure.dense.macs


# The page


class Balanced(HTMLParser):
    """Raises where a tag is closed that is not the open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", NETWORKS)
def test_page_is_whole_and_its_drawing_has_every_layer_once(name: str) -> None:
    structure = taken(name)
    page = html(structure)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    titles = [t.text or "" for t in svg.iter("{http://www.w3.org/2000/svg}title")]
    boxes = [title.splitlines()[0] for title in titles if " MACs (" in title]
    layers = {name for b in structure.bundles for name in b.layers}
    layers |= {w.layer for w in structure.whole if any(w.layer == str(n.target) for n in
               structure.graph.kinds)}  # fmt: skip
    calls = [str(n.target) for n in structure.graph.kinds if str(n.target) in layers]
    assert sorted(boxes) == sorted(calls)


@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_of_pixels_and_parameters_are_no_boxes(name: str) -> None:
    boxes, edges = drawn(taken(name).graph)
    entries = set(range(len(boxes))) - {target for _, target in edges}
    assert [boxes[entry][0].op for entry in entries] == ["placeholder"]


def test_drawing_joins_what_the_network_joins() -> None:
    structure = taken("resnet", "shared")
    boxes, edges = drawn(structure.graph)
    names = [str(nodes[0].target) if nodes[0].op == "call_module" else nodes[0].name
             for nodes in boxes]  # fmt: skip
    lines = {(names[a], names[b]) for a, b in edges}
    assert lines >= {
        ("x", "conv1"), ("conv1", "layer1.0.conv1"), ("layer1.0.conv1", "layer1.0.conv2"),
        ("layer1.0.conv2", "iadd"), ("conv1", "iadd"), ("iadd", "layer1.1.conv1"), ("fc", "output"),
    }  # fmt: skip
    assert len([line for line in lines if line[1] == "iadd"]) == 2


class Compares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(self.a(x)))
        return (x > 0) & (x < 1)  # "<b>"


def test_code_and_names_on_the_page_are_text() -> None:
    subject = Subject("<i>", Compares().eval(), (3, 4, 4))
    page = html(take_apart(subject, (3, 4, 4)))
    assert "(x &lt; 1)  # &#34;&lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "<i>" not in page


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[tuple[float, float]], list[tuple[int, int]]]:
    count = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.sampled_from([(190.0, 38.0), (28.0, 22.0)]), min_size=count,
                          max_size=count))  # fmt: skip
    pairs = list(combinations(range(count), 2))
    return sizes, sorted(draw(st.sets(st.sampled_from(pairs)))) if pairs else []


def overlap(a: Box, b: Box) -> bool:
    near = 1e-6
    across = abs(a.x - b.x) < (a.width + b.width) / 2 - near
    return across and abs(a.y - b.y) < (a.height + b.height) / 2 - near


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_no_box_lies_on_another_or_on_a_line_that_passes(
    graph: tuple[list[tuple[float, float]], list[tuple[int, int]]],
) -> None:
    sizes, edges = graph
    layout = arranged(sizes, edges)
    assert [(box.width, box.height) for box in layout.boxes] == sizes
    for a, b in combinations([*layout.boxes, *layout.passed], 2):
        assert not overlap(a, b)
    for box in layout.boxes:
        assert box.x - box.width / 2 >= -1e-6
        assert box.x + box.width / 2 <= layout.width + 1e-6
        assert 0 <= box.y - box.height / 2 < box.y + box.height / 2 <= layout.height
    reached: dict[Box, set[Box]] = {}
    for upper, lower in sorted(layout.lines, key=lambda line: line[0].y, reverse=True):
        assert upper.y < lower.y
        ends = {lower} if lower in layout.boxes else reached.get(lower, set())
        reached.setdefault(upper, set()).update(ends)
    ends = {a: {layout.boxes[t] for s, t in edges if s == i} for i, a in enumerate(layout.boxes)}
    assert {box: reached.get(box, set()) for box in layout.boxes} == ends


# The command


def called(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        main([*words])
        status = 0
    except SystemExit as stop:
        status = int(str(stop.code or 0))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


MINE = """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.free = nn.Conv2d(1, 8, 3, padding=1)
        self.stuck = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stuck(self.free(x))
        return (
            x.cumsum(1)
        )


def build():
    return Net()


def number():
    return 7


def broken():
    raise LookupError("no table")


class Never(Net):
    def forward(self, x):
        return x.cumsum(1) + self.stuck.weight.sum()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's own beside them."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def test_network_of_your_own_is_explained_with_your_lines(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("mine:build", "--image", "1,8,8", "--page", "out/net.html")
    status, out, err = called(*words, capsys=capsys)
    assert (status, err) == (0, "")
    assert "mine.py:13  x.cumsum(1)" in out
    assert re.search(r"one layer +free\n", out)
    assert "out/net.html shows it all" in out
    assert "cumsum" in (mine / "out" / "net.html").read_text()


def test_json_holds_what_the_text_says(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = called("mine:build", "--image", "1,8,8", "--json", capsys=capsys)
    content = json.loads(out)
    assert status == 0
    assert [group["layers"] for group in content["groups"]] == [["free"]]
    (kept,) = content["kept_whole"]
    assert (kept["layer"], kept["place"]["line"]) == ("stuck", 13)
    assert content["prunable_share"] + kept["share"] == pytest.approx(100)
    assert content["after"]["macs"] < content["macs"] == 64 * (8 * 9 + 8 * 8 * 9)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("mine:build", "--image", "1,8,8", "--ignore", "free"),
         "mine:build: nothing can be pruned, free first: ignore=free (mine.py:11)"),
        (("mine:Never",), "mine:Never: nothing can be pruned, free first: "),
        (("mine:build", "--image", "1,8,8", "--ignore", "none*"), "none* fits no layer"),
        (("mine:build", "--image", "3,8,8"), "--image 3,8,8: mine:build does not take images of 3"),
        (("mine:build",), "--image 3,224,224: mine:build does not take images of 3x224x224"),
        (("mine:build", "--image", "8,8"), "--image 8,8: channels, height and width"),
        (("mine:build", "--image", "1,8,0"), "--image 1,8,0: channels, height and width"),
        (("mine:nothing",), "MODEL=mine:nothing: cannot be imported"),
        (("no_such_module:build",), "MODEL=no_such_module:build: cannot be imported (No module"),
        (("mine:number",), "MODEL=mine:number: returns a int and no torch.nn.Module"),
        (("mine:MINE_",), "cannot be imported"),
        (("mine:broken",), "called without arguments it raises LookupError: no table"),
        (("mine:nn",), "MODEL=mine:nn: is a module and no function"),
        (("resnet57",), "resnet57: no network, run or checkpoint of that name; the nearest are "
         "resnet56"),
        (("qqqqqq",), "; give a network of fpgm or torchvision, timm:NAME"),
        (("timm:resnet51",), "timm: "),
        (("resnet20", "--rate", "1"), "--rate 1: at least 0 and below 1"),
        (("resnet20", "--residual", "some"), "--residual some: choose one of independent"),
        (("resnet20", "--page", "a.txt"), "--page a.txt: a file that ends in .html"),
        (("mine.py",), "mine.py: truncated or damaged"),
        (("run",), "run: no zeroed.pt there, so that run is not done; fpgm-explain resnet20 tells"),
        (("weights.pt",), "weights.pt: only weights; give the network's name"),
        ((".",), ".: no config.yaml, so it is no run directory"),
    ],
)  # fmt: skip
def test_mistake_is_one_line_and_status_1(
    mine: Path, words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", None)
    line = "timm:resnet51: needs timm: pip install 'fpgm[timm]'" if line == "timm: " else line
    a_run(mine / "run", "arch=resnet20", done=False)
    checkpoint.write(mine / "weights.pt", {"a": torch.zeros(1)})
    status, out, err = called(*words, capsys=capsys)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("fpgm-explain: ")
    assert line in err


def test_page_is_written_where_nothing_can_be_pruned(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = called("mine:Never", "--page", "net.html", capsys=capsys)
    assert status == 1
    assert err.endswith("net.html shows it all, with the graph drawn\n")
    assert "nothing can be pruned" in (mine / "net.html").read_text()


def test_timm_network_brings_its_image_and_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("timm")
    assert find("timm:resnet10t").image == (3, 176, 176)
    status, _, err = called("timm:resnet10q", capsys=capsys)
    assert status == 1
    assert "timm has no network of that name; the nearest are resnet" in err


def test_finished_run_and_its_checkpoint_are_explained_on_their_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", "arch=resnet20")
    model = fpgm.model("resnet20", 7, 1)
    about = {"mean": [0.0], "std": [1.0], "image_shape": [1, 28, 28], "classes": list("abcdefg")}
    arch = {"name": "resnet20", "num_classes": 7, "in_channels": 1}
    content = {"arch": arch, "keep": {}, "preprocessing": about, "state_dict": model.state_dict()}
    checkpoint.write(run / "zeroed.pt", content)
    for path in (run, run / "zeroed.pt"):
        status, out, _ = called(str(path), capsys=capsys)
        macs = fpgm.cost(model, (1, 28, 28)).macs
        assert status == 0
        assert out.startswith(f"{path} on images of 1x28x28: {macs:,} MACs")


def test_names_of_fpgm_and_torchvision_bring_what_they_are_made_for() -> None:
    assert find("resnet20").image == (3, 32, 32)
    assert find("lenet5").image == (3, 28, 28)
    assert find("squeezenet1_1").image == (3, 224, 224)
    assert find("resnet18").image == (3, 224, 224)
    assert isinstance(find("lraspp_mobilenet_v3_large").model, nn.Module)
