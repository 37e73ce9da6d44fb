from __future__ import annotations

import json

import pytest
import torch

from robustft.clip import import_open_clip, prompts
from robustft.clip.prompts import PromptTable, captions, format_template, match_descriptions, read_descriptions


def tokenizer(texts: list[str]) -> torch.Tensor:
    """One token a character, padded to 24."""
    return torch.tensor([[ord(c) for c in text.ljust(24)[:24]] for text in texts])


def test_format_template_replaces_either_placeholder_and_calls_callables():
    assert format_template("a {}, a {}", "cat") == "a cat, a cat"
    assert format_template("a {c}.", "cat") == "a cat."
    assert format_template(lambda c: f"{c}!", "cat") == "cat!"


def test_braces_in_class_names_and_templates_survive():
    assert format_template("a {} {0}", "set {}") == "a set {} {0}"


@pytest.mark.parametrize("template, error", [("a photo.", ValueError), (3, TypeError), (lambda c: 3, TypeError)])
def test_unusable_templates_are_refused(template, error):
    with pytest.raises(error, match="templates"):
        format_template(template, "cat")


def test_captions_keep_duplicate_classes_and_order():
    assert captions(["b", "a", "b"], ["{}1", "{}2"]) == (("b1", "b2"), ("a1", "a2"), ("b1", "b2"))


@pytest.mark.parametrize(
    "names, templates, error",
    [
        ([], ["{}"], ValueError),
        (["a", " "], ["{}"], ValueError),
        ("cat", ["{}"], TypeError),
        (["a", 3], ["{}"], TypeError),
        (["a"], [], ValueError),
        (["a"], "a {}", TypeError),
    ],
)
def test_empty_blank_and_bare_string_lists_are_refused(names, templates, error):
    with pytest.raises(error, match="class_names|templates"):
        captions(names, templates)


def test_imagenet_templates_equal_open_clips():
    open_clip = import_open_clip()
    names = ("IMAGENET_TEMPLATES", "OPENAI_IMAGENET_TEMPLATES"), ("SIMPLE_IMAGENET_TEMPLATES",) * 2
    for ours, theirs in names:
        expected = [template("cat") for template in getattr(open_clip, theirs)]
        assert [format_template(template, "cat") for template in getattr(prompts, ours)] == expected
    assert not hasattr(prompts, "OTHER_TEMPLATES")


def test_tokens_are_the_captions_of_label_and_template():
    names, templates = ["ant", "bee", "ant"], ["a {}", "the {}"]
    table = PromptTable(tokenizer, names, templates)
    labels, chosen = torch.tensor([2, 1, 0, 1]), torch.tensor([1, 0, 1, 1])
    expected = tokenizer(["the ant", "a bee", "the ant", "the bee"])
    assert torch.equal(table.tokens(labels, chosen), expected)
    tokens, index = table.unique(labels, chosen)
    assert torch.equal(tokens[index], expected)
    assert len(tokens) == 3  # classes 0 and 2 share a name, hence their captions


def test_sampled_captions_belong_to_their_labels_and_are_distinct():
    names = [f"class{k}" for k in range(5)]
    table = PromptTable(tokenizer, names, ["a {}", "the {}", "my {}"])
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    tokens, index = table.sample(labels, torch.Generator().manual_seed(1))
    assert len(tokens.unique(dim=0)) == len(tokens) == 15
    for label, row in zip(labels.tolist(), tokens[index], strict=True):
        assert f"class{label}" in "".join(map(chr, row.tolist()))


def test_sampling_is_uniform_over_each_classs_own_captions():
    table = PromptTable.from_captions(tokenizer, [["a", "b"], ["c", "d", "e", "f"]])
    tokens, index = table.sample(torch.tensor([0, 1]).repeat(20000), torch.Generator().manual_seed(0))
    shares = dict(zip((chr(t) for t in tokens[:, 0]), index.bincount() / 20000, strict=True))
    expected = dict.fromkeys("ab", 0.5) | dict.fromkeys("cdef", 0.25)
    assert shares.keys() == expected.keys()
    assert all(abs(shares[text] - expected[text]) < 0.014 for text in shares)  # 4 standard deviations


def test_the_generator_decides_the_sample():
    table = PromptTable(tokenizer, ["ant"], ["a {}", "the {}"])
    labels = torch.zeros(64, dtype=torch.long)
    draws = [table.sample(labels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0].index, draws[1].index)
    assert not torch.equal(draws[0].index, draws[2].index)


def test_features_gathered_from_distinct_captions_have_the_same_gradient_as_encoding_all():
    table = PromptTable(tokenizer, ["ant", "bee"], ["a {}", "the {}"])
    tokens, index = table.sample(torch.tensor([0, 1] * 8), torch.Generator().manual_seed(0))
    weight = torch.randn(24, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(16, 3, dtype=torch.float64)
    once = torch.autograd.grad(((tokens.double() @ weight).tanh()[index] * upstream).sum(), weight)[0]
    every = torch.autograd.grad(((tokens[index].double() @ weight).tanh() * upstream).sum(), weight)[0]
    torch.testing.assert_close(once, every, rtol=1e-12, atol=1e-12)


def test_labels_and_template_indices_out_of_range_are_refused():
    table = PromptTable.from_captions(tokenizer, [["a"], ["b", "c"]])
    for labels in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match="labels"):
            table.sample(labels)
    for chosen in (1, -1):
        with pytest.raises(ValueError, match="template_indices"):
            table.tokens(torch.tensor([0]), chosen)


def test_an_empty_batch_samples_no_captions():
    tokens, index = PromptTable(tokenizer, ["ant"], ["a {}"]).sample(torch.tensor([], dtype=torch.long))
    assert tokens.shape == (0, 24) and index.shape == (0,)


def test_class_names_are_read_from_text_lists_and_objects(tmp_path):
    (tmp_path / "names.txt").write_text("great white shark\nété\n\n", encoding="utf-8")
    (tmp_path / "list.json").write_text('["b", "a"]')
    (tmp_path / "object.json").write_text('{"b": "striped", "a": ["spotted"]}')
    assert prompts.read_class_names(tmp_path / "names.txt") == ("great white shark", "été")
    assert prompts.read_class_names(tmp_path / "list.json") == ("b", "a")
    assert prompts.read_class_names(tmp_path / "object.json") == ("b", "a")


@pytest.mark.parametrize("text", ["", "a\n\nb\n"])
def test_text_files_with_blank_lines_inside_are_refused(tmp_path, text):
    # A skipped line would shift every later label by one.
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match="names.txt"):
        prompts.read_class_names(tmp_path / "names.txt")


def test_templates_are_read_and_checked(tmp_path):
    (tmp_path / "t.json").write_text('["a {}", "the {c}"]')
    assert prompts.read_templates(tmp_path / "t.json") == ("a {}", "the {c}")
    (tmp_path / "t.txt").write_text("a photo\n")
    with pytest.raises(ValueError, match="a photo"):
        prompts.read_templates(tmp_path / "t.txt")


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "t.json").write_text('["a {}"')
    with pytest.raises(ValueError, match="t.json"):
        prompts.read_templates(tmp_path / "t.json")


def test_descriptions_are_matched_by_name_whatever_their_order(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"bee": ["striped", "furry"], "ant": "six legs"}))
    assert read_descriptions(path, ["ant", "bee", "ant"]) == (
        ("six legs",),
        ("striped", "furry"),
        ("six legs",),
    )


def test_description_lists_are_matched_by_position():
    assert match_descriptions(["x", ["y", "z"]], ["ant", "bee"]) == (("x",), ("y", "z"))
    with pytest.raises(ValueError, match="2 entries .* 3 classes"):
        match_descriptions(["x", "y"], ["ant", "bee", "cat"])


def test_mismatched_descriptions_name_the_classes(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"Bee": "striped", "ant": "six legs"}))
    with pytest.raises(ValueError, match="d.json.*no description of 'bee'; no class called 'Bee'"):
        read_descriptions(path, ["ant", "bee"])


def test_duplicate_or_blank_descriptions_are_refused(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{"ant": "x", "ant": "y"}')
    with pytest.raises(ValueError, match="duplicate keys 'ant'"):
        read_descriptions(path, ["ant"])
    for blank in ("", [], [" "]):
        with pytest.raises(ValueError, match="'ant'"):
            match_descriptions({"ant": blank}, ["ant"])
