"""Tables of weights: read from a file, applied to arrays, and proposed for other people's models."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from capsnet_jax.errors import UsageError
from capsnet_verify.proposal import propose_map, propose_outputs
from capsnet_verify.weight_map import Axes, Counterpart, Output, read_map

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
    assert weight_map.labels == "indices"
    assert weight_map.weights == {
        "conv.weight": Counterpart("stem"),
        "W": Counterpart("votes", Axes("1 (g p) h d -> (p g) d h", {"g": 3})),
    }
    assert weight_map.outputs == {
        "poses": Output("capsules", Axes("b o h 1 -> b o h")),
        "activations": Output(1),
        "reconstructions": Output(),
    }
    assert weight_map.values == {"layers.0": Counterpart("stem 0", relu=True)}


POSES = "[outputs]\nposes = 0\n"
GOOD = '[weights]\nW = "votes"\n' + POSES
WEIGHT = POSES + "[weights]\nW = %s\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[weights", "map.toml is not a TOML file that can be read: "),
        ("a = 1\n" + GOOD, "map.toml has the unknown entry 'a'; expected labels, weights, outputs, values."),
        ("labels = 3\n" + GOOD, "map.toml: labels is 3; expected 'indices' or 'one-hot'."),
        ("weights = 2\n", "map.toml: [weights] is 2; expected a table."),
        ("[outputs]\nposes = 0\n", "map.toml has no [weights]"),
        ('[weights]\nW = "votes"\n', "map.toml: [outputs] has neither poses nor activations"),
        (GOOD + "logits = 1\n", "map.toml: [outputs] has the unknown entry 'logits'; expected poses, activations"),
        (GOOD + "activations = true\n", 'map.toml: [outputs] "activations" is True; expected the index'),
        (GOOD + "activations = { form = 1 }\n", "[outputs] \"activations\" has the unknown entry 'form'"),
        (WEIGHT % "1", 'map.toml: [weights] "W" is 1; expected a name of ours, or a table with a name.'),
        (WEIGHT % '{ axes = "a -> a" }', "[weights] \"W\" is {'axes': 'a -> a'}; expected a name of ours"),
        (WEIGHT % '{ name = "a", relu = true }', "[weights] \"W\" has the unknown entry 'relu'"),
        (WEIGHT % '"a"\nV = "a"', '[weights] has "a" of ours twice, for "W" and "V"; expected it once.'),
        (WEIGHT % '{ name = "a", axes = 3 }', '[weights] "W": axes are 3; expected theirs and ours'),
        (WEIGHT % '{ name = "a", axes = "a b" }', "[weights] \"W\": axes are 'a b'; expected theirs and ours"),
        (WEIGHT % '{ name = "a", axes = "(a b -> a b" }', "which einops cannot read: Imbalanced parentheses"),
        (WEIGHT % '{ name = "a", axes = "a b -> a" }', "expected the same names on both sides"),
        (WEIGHT % '{ name = "a", axes = "a ... -> ... a" }', "expected the same names on both sides"),
        (WEIGHT % '{ name = "a", axes = "a -> a 2" }', "and no number but 1."),
        (WEIGHT % '{ name = "a", sizes = { g = 3 } }', '"W" has sizes and no axes; expected both or neither.'),
        (WEIGHT % '{ name = "a", axes = "a -> a", sizes = { g = 3 } }', 'sizes has g = 3; expected positive'),
        (WEIGHT % '{ name = "a", axes = "a -> a", sizes = { a = 0 } }', 'sizes has a = 0; expected positive'),
        (GOOD + '[values]\nconv = { name = "a", relu = 1 }\n', '[values] "conv": relu is 1; expected true or false.'),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_a_sentence(tmp_path, text, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "map.toml"))


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path):
    with pytest.raises(UsageError, match=re.escape("none.toml does not exist; expected a map of weights.")):
        read_map(tmp_path / "none.toml")
    (tmp_path / "map.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=re.escape("map.toml is not a TOML file that can be read: 'utf-8' codec")):
        read_map(tmp_path / "map.toml")


def test_axes_are_taken_apart_and_put_in_order():
    theirs = np.random.default_rng(0).normal(size=(1, 6, 5, 4))
    ours = Axes("1 (g p) h d -> (p g) d h", {"g": 3}).to_ours("W", theirs, (6, 4, 5))
    for group in range(3):
        for position in range(2):
            for d in range(4):
                for h in range(5):
                    assert ours[position * 3 + group, d, h] == theirs[0, group * 2 + position, h, d]


def test_sizes_are_taken_from_the_shape_of_ours():
    theirs = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    ours = Axes("f (o h) -> o h f").to_ours("fc.weight", theirs, (5, 6, 7))
    assert torch.equal(ours, theirs.T.view(5, 6, 7))


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (Axes(), "W is (4, 6); ours is (6, 4)."),
        (Axes("a b -> a b"), 'W is (4, 6), which "a b -> a b" does not make (6, 4), the shape of ours.'),
        (Axes("a b -> b a 1"), 'W is (6, 4, 1), arranged by "a b -> b a 1"; ours is (6, 4).'),
        (Axes("(g a) b -> b (a g)", {"g": 3}), '"(g a) b -> b (a g)" with g = 3 does not make (6, 4)'),
    ],
)
def test_a_shape_that_does_not_fit_is_told(axes, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        axes.to_ours("W", np.zeros((4, 6)), (6, 4))


class Theirs(nn.Module):
    """Two convolutions of equal shapes, a normalisation, a square by hand, and a weight that ours has not."""

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


def zeros(**shapes):
    return {name.replace("__", "."): np.zeros(shape) for name, shape in shapes.items()}


OURS = zeros(
    e__0__weight=(8, 2, 3, 3), e__0__bias=(8,),
    e__2__weight=(8,), e__2__bias=(8,), e__2__running_mean=(8,), e__2__running_var=(8,),
    e__3__weight=(8, 8, 3, 3), e__3__bias=(8,), e__5__weight=(8, 8, 3, 3), e__5__bias=(8,),
    d__input_caps2U__weight=(18, 4, 5, 6),
    decoder__0__weight=(5, 6, 7), decoder__0__bias=(1, 7), decoder__2__weight=(7, 7), decoder__9__bias=(23,),
)  # fmt: skip

PROPOSED = """\
# Proposed from names and shapes. Look through every line; comments are guesses, or what has no partner.
# No shape tells in which order channels become capsules: axes and sizes can bring one order into the other.
# labels = "one-hot"  # or "indices": how labels follow the images, if forward takes them
[weights]  # theirs = ours
"first.weight" = "e.0.weight"
"first.bias" = "e.0.bias"
"norm.weight" = "e.2.weight"
"norm.bias" = "e.2.bias"
"norm.running_mean" = "e.2.running_mean"
"norm.running_var" = "e.2.running_var"
# "second.weight" = "e.3.weight"  # a guess, by order and sizes, as well as third.weight
# "second.bias" = "e.3.bias"  # a guess, by order and sizes, by what is left
# "third.weight" = "e.5.weight"  # a guess, by order and sizes, by what is left
# "third.bias" = "e.5.bias"  # a guess, by order and sizes, by what is left
"caps" = { name = "d.input_caps2U.weight", axes = "1 o i h d 1 -> i d o h" }
# "fc.weight" = { name = "decoder.0.weight", axes = "c (a b) -> a b c" }  # a guess, as axes are flattened, perhaps in another order
"fc.bias" = { name = "decoder.0.bias", axes = "a -> 1 a" }
# "square" = "decoder.2.weight"  # a guess, as axes of one size may be transposed
# "decoder.9.bias" of ours, (23,), has no partner
# "scale" of theirs, (), has no partner
"""  # noqa: E501


def test_what_is_proposed_word_for_word():
    assert propose_map(Theirs(), OURS) == PROPOSED


SHAPES = {"poses": (3, 5, 6), "activations": (3, 5), "reconstructions": (3, 2, 9, 8)}


def test_outputs_are_proposed_by_their_shapes():
    lengths, poses, image = torch.zeros(3, 5), torch.zeros(3, 5, 6, 1), torch.zeros(3, 144)
    head = "[outputs]  # ours = index of a tuple, key of a dict or attribute; {} for a single tensor\n"
    none = {"poses": "# poses = ?  # nothing is (3, 5, 6)\n"}
    none |= {"reconstructions": "# reconstructions = ?  # nothing is (3, 2, 9, 8)\n"}
    alone = f"{none['poses']}activations = {{}}\n{none['reconstructions']}"
    assert propose_outputs(lengths, SHAPES) == head + alone
    given = {"v": poses, "length": lengths, "other": lengths, "image": image}
    assert propose_outputs(given, SHAPES) == (
        head + 'poses = { from = "v", axes = "a b c 1 -> a b c" }\n'
        '# activations = "length"  # a guess, as well as "other"\n'
        '# reconstructions = { from = "image", axes = "a (b c d) -> a b c d" }'
        "  # a guess, as axes are flattened, perhaps in another order\n"
    )
    raised = propose_outputs(TypeError("forward() missing 'y'\nand more"), SHAPES)
    assert raised.startswith(head + "# forward(images) raises TypeError: forward() missing 'y'\n# poses = ?")
