"""Maps of weights: read from a file, applied to arrays, and proposed for other people's models."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_verify.proposal import propose_map, propose_outputs
from capsnet_verify.weight_map import Part, patterns, read_map

FULL = """\
labels = "indices"
[weights]
"conv.weight" = "stem"
W = { name = "votes", axes = "1 (g p) h d -> (p g) d h", sizes = { g = 3 } }
[outputs]
poses = { from = "capsules", axes = "b o h 1 -> b o h" }
activations = 1
reconstructions = {}
[values]
"layers.0" = { name = "stem 0", relu = true }
"""


def read(tmp_path, text):
    path = tmp_path / "map.toml"
    path.write_text(text)
    return read_map(path)


def test_a_map_is_read(tmp_path):
    weight_map = read(tmp_path, FULL)
    weights, outputs, values = (f"{tmp_path}/map.toml: [{table}]" for table in ("weights", "outputs", "values"))
    assert weight_map.labels == "indices"
    assert weight_map.weights == [
        Part("conv.weight", "stem", where=f'{weights} "conv.weight"'),
        Part("W", "votes", "1 (g p) h d -> (p g) d h", {"g": 3}, where=f'{weights} "W"'),
    ]
    assert weight_map.outputs == [
        Part("capsules", "poses", "b o h 1 -> b o h", where=f'{outputs} "poses"'),
        Part(1, "activations", where=f'{outputs} "activations"'),
        Part(None, "reconstructions", where=f'{outputs} "reconstructions"'),
    ]
    assert weight_map.values == [Part("layers.0", "stem 0", relu=True, where=f'{values} "layers.0"')]


POSES = "[outputs]\nposes = 0\n"
GOOD = '[weights]\nW = "votes"\n' + POSES
WEIGHT = POSES + "[weights]\nW = %s\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[weights", "map.toml is not a TOML file that can be read: "),
        ("a = " + "[" * 9000, "map.toml is not a TOML file that can be read: maximum recursion depth exceeded."),
        ("a = 1\n" + GOOD, "map.toml has the unknown entry 'a'; expected labels, weights, outputs, values."),
        ("labels = 3\n" + GOOD, "map.toml: labels is 3; expected 'indices' or 'one-hot'."),
        ("weights = 2\n", "map.toml: [weights] is 2; expected a table."),
        ("[outputs]\nposes = 0\n", "map.toml has no [weights]"),
        ('[weights]\nW = "votes"\n', "map.toml: [outputs] has neither poses nor activations"),
        (GOOD + "logits = 1\n", "map.toml: [outputs] has the unknown entry 'logits'; expected poses, activations"),
        (GOOD + "activations = true\n", 'map.toml: [outputs] "activations" is True; expected the index'),
        (GOOD + "activations = { form = 1 }\n", "[outputs] \"activations\" has the unknown entry 'form'"),
        (WEIGHT % "1", 'map.toml: [weights] "W" is 1; expected a name in capsnet_torch, alone or as `name` in a'),
        (WEIGHT % '{ axes = "a -> a" }', "[weights] \"W\" is {'axes': 'a -> a'}; expected a name in capsnet_torch"),
        (WEIGHT % '{ name = "a", relu = true }', "[weights] \"W\" has the unknown entry 'relu'"),
        (WEIGHT % '"a"\nV = "a"', "[weights] \"V\" is 'a', as 'W' is; expected each name once."),
        (WEIGHT % '{ name = "a", axes = 3 }', '[weights] "W": axes are 3; expected an einops pattern'),
        (WEIGHT % '{ name = "a", axes = "a b" }', "[weights] \"W\": axes are 'a b'; expected an einops pattern"),
        (WEIGHT % '{ name = "a", axes = "a -> a -> a" }', "axes are 'a -> a -> a'; expected an einops pattern"),
        (WEIGHT % '{ name = "a", sizes = { g = 3 } }', "sizes are {'g': 3}; expected positive sizes of axes in the"),
        (WEIGHT % '{ name = "a", axes = "a -> a", sizes = { a = 0 } }', "sizes are {'a': 0}; expected positive"),
        (WEIGHT % '{ name = "a", axes = "a -> a", sizes = { a = "3" } }', "sizes are {'a': '3'}; expected positive"),
        (WEIGHT % '{ name = "a", axes = "a -> a", sizes = 3 }', "sizes are 3; expected positive"),
        (GOOD + '[values]\nconv = { name = "a", relu = 1 }\n', '[values] "conv": relu is 1; expected true or false.'),
    ],
)  # fmt: skip
def test_a_wrong_map_is_refused_in_a_sentence(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "map.toml"))


def test_a_file_that_does_not_exist_or_is_not_text_is_refused(tmp_path):
    with pytest.raises(UsageError, match=re.escape("none.toml does not exist; expected a map of weights.")):
        read_map(tmp_path / "none.toml")
    (tmp_path / "map.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=re.escape("map.toml is not a TOML file that can be read: 'utf-8' codec")):
        read_map(tmp_path / "map.toml")


def test_axes_are_split_and_reordered_there_and_back():
    part = Part("W", "votes", "1 (g p) h d -> (p g) d h", {"g": 3})
    theirs = np.random.default_rng(0).normal(size=(1, 6, 5, 4))
    ours = part.to_twin(theirs, (6, 4, 5))
    for group in range(3):
        for position in range(2):
            for d in range(4):
                for h in range(5):
                    assert ours[position * 3 + group, d, h] == theirs[0, group * 2 + position, h, d]
    np.testing.assert_array_equal(part.to_source(ours, theirs.shape), theirs)


def test_sizes_are_inferred_from_the_shape_in_capsnet_torch():
    part = Part("fc.weight", "decoder.0.weight", "f (o h) -> o h f")
    theirs = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    ours = part.to_twin(theirs, (5, 6, 7))
    assert torch.equal(ours, theirs.T.view(5, 6, 7))
    assert torch.equal(part.to_source(ours, (7, 30)), theirs)


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        ("", {}, "W is (4, 6); expected (6, 4), as votes."),
        ("a b -> a b", {}, 'W is (4, 6) with { axes = "a b -> a b" }; expected (6, 4), as votes ('),
        ("a b -> b a 1", {}, 'W is (4, 6) with { axes = "a b -> b a 1" }; expected (6, 4), as votes.'),
        ("(g a) b -> b (a g)", {"g": 3}, '{ axes = "(g a) b -> b (a g)", sizes = { g = 3 } }; expected (6, 4), as vo'),
        ("a b -> b a", {"c": 3}, "Axis c is not used in transform)."),
        ("(a b -> a b", {}, "as votes (Imbalanced parentheses in expression"),
        ("a b -> a", {}, "Identifiers only on one side of expression (should be on both): {'b'})."),
        ("a b -> b a 2", {}, "as votes ("),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(axes, sizes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        Part("W", "votes", axes, sizes, where="W").to_twin(np.zeros((4, 6)), (6, 4))


@pytest.mark.parametrize(
    ("shape", "name", "target", "groups", "expected"),
    [
        ((4, 6), "w", (4, 6), 0, [""]),
        ((6, 4), "w", (4, 6), 0, ["b a -> a b"]),
        ((4, 4), "w", (4, 4), 0, ["", "b a -> a b"]),
        ((1, 7, 1), "w", (7,), 0, ["1 a 1 -> a"]),
        ((7,), "w", (1, 7), 0, ["b -> 1 b"]),
        ((7, 6), "w", (2, 3, 7), 0, ["c (a b) -> a b c", "c (b a) -> a b c"]),
        ((7, 5), "w", (7, 6), 0, []),
        ((42, 2), "w", (6, 14), 0, []),
        ((1, 18, 5, 6, 4), "input_caps2U.weight", (18, 4, 5, 6), 0, ["1 i o h d -> i d o h"]),
        (
            (18, 5, 7, 4), "input_caps2U.weight", (18, 4, 5, 7), 3,
            ["(p g) o h d -> (p g) d o h", "(g p) o h d -> (p g) d o h"],
        ),
    ],
)  # fmt: skip
def test_every_pattern_between_two_shapes_is_listed(shape, name, target, groups, expected):
    found = patterns(shape, name, target, groups=groups)
    assert found == expected
    array = np.arange(np.prod(shape)).reshape(shape)
    sizes = {"g": groups} if groups else {}
    arranged = [Part("w", name, axes, sizes).to_twin(array, target) for axes in found]
    assert len({each.tobytes() for each in arranged}) == len(found)


class Theirs(nn.Module):
    """Convolutions of equal shapes, a normalization, a square weight outside a layer, and a weight without partner."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3)
        self.third = nn.Conv2d(8, 8, 3)
        self.caps = nn.Parameter(torch.zeros(1, 5, 18, 6, 4, 1))
        self.fc = nn.Linear(30, 7)
        self.square = nn.Parameter(torch.zeros(7, 7))
        self.scale = nn.Parameter(torch.zeros(()))


OURS = {
    "e.0.weight": (8, 2, 3, 3), "e.0.bias": (8,),
    "e.2.weight": (8,), "e.2.bias": (8,), "e.2.running_mean": (8,), "e.2.running_var": (8,),
    "e.3.weight": (8, 8, 3, 3), "e.3.bias": (8,), "e.5.weight": (8, 8, 3, 3), "e.5.bias": (8,),
    "d.input_caps2U.weight": (18, 4, 5, 6),
    "decoder.0.weight": (5, 6, 7), "decoder.0.bias": (1, 7), "decoder.2.weight": (7, 7), "decoder.9.bias": (23,),
}  # fmt: skip

PROPOSED = """\
# Proposed from names and shapes. Check every line; comments are guesses, or have no partner.
# Shapes do not show in which order channels become capsules: axes and sizes can change the order.
# labels = "one-hot"  # or "indices": how labels follow the images, if forward takes them
[weights]  # name in your module = name in capsnet_torch
"first.weight" = "e.0.weight"
"first.bias" = "e.0.bias"
"norm.weight" = "e.2.weight"
"norm.bias" = "e.2.bias"
"norm.running_mean" = "e.2.running_mean"
"norm.running_var" = "e.2.running_var"
# "second.weight" = "e.3.weight"  # a guess: "third.weight" fits as well
# "second.bias" = "e.3.bias"  # a guess: by what is left
# "third.weight" = "e.5.weight"  # a guess: by what is left
# "third.bias" = "e.5.bias"  # a guess: by what is left
"caps" = { name = "d.input_caps2U.weight", axes = "1 o i h d 1 -> i d o h" }
# "fc.weight" = { name = "decoder.0.weight", axes = "c (a b) -> a b c" }  # a guess: 2 orders of axes fit
"fc.bias" = { name = "decoder.0.bias", axes = "b -> 1 b" }
# "square" = "decoder.2.weight"  # a guess: 2 orders of axes fit
# "decoder.9.bias" of capsnet_torch, (23,), has no partner
# "scale" of your module, (), has no partner
"""


def test_a_map_is_proposed():
    assert propose_map(Theirs(), OURS) == PROPOSED


SHAPES = {"poses": (3, 5, 6), "activations": (3, 5), "reconstructions": (3, 2, 9, 8)}
HEAD = "[outputs]  # output = index of a tuple, key of a dict or attribute; {} for a single tensor\n"
POSES_MISSING, IMAGES_MISSING = (
    "# poses = ?  # nothing is (3, 5, 6)\n",
    "# reconstructions = ?  # nothing is (3, 2, 9, 8)\n",
)
LENGTHS = torch.zeros(3, 5)
ALL = {"v": torch.zeros(3, 5, 6, 1), "length": LENGTHS, "other": LENGTHS, "image": torch.zeros(3, 144)}


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (LENGTHS, f'{POSES_MISSING}"activations" = {{}}\n{IMAGES_MISSING}'),
        ((None, LENGTHS), f'{POSES_MISSING}"activations" = 1\n{IMAGES_MISSING}'),
        (
            ALL,
            '"poses" = { from = "v", axes = "a b c 1 -> a b c" }\n'
            '# "activations" = "length"  # a guess: "other" fits as well\n'
            '# "reconstructions" = { from = "image", axes = "a (b c d) -> a b c d" }  # a guess: 6 orders of axes fit'
            "\n",
        ),
        (
            TypeError("forward() missing 'y'\nand more"),
            "# forward(images) raises TypeError: forward() missing 'y'\n"
            f"{POSES_MISSING}# activations = ?  # nothing is (3, 5)\n{IMAGES_MISSING}",
        ),
    ],
    ids=["tensor", "tuple", "dict", "exception"],
)
def test_outputs_are_proposed_by_their_shapes(returned, expected):
    assert propose_outputs(returned, SHAPES) == HEAD + expected
