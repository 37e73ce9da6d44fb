from __future__ import annotations

import copy
import json

import pytest
import torch

from robustft.clip import import_open_clip, prompts
from robustft.clip.prompts import (
    PromptTable,
    Truncating,
    captions,
    format_template,
    match_descriptions,
    read_descriptions,
    tokenize,
    tokenize_classes,
)


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
    names = [f"kind {k}" for k in range(5)]
    table = PromptTable(tokenizer, names, ["a {}", "the {}", "my {}"])
    labels = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
    tokens, index = table.sample(labels, torch.Generator().manual_seed(1))
    assert len(tokens.unique(dim=0)) == len(tokens) == 15
    for label, row in zip(labels.tolist(), tokens[index], strict=True):
        assert f"kind {label}" in "".join(map(chr, row.tolist()))


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
    assert torch.equal(draws[0].inverse, draws[1].inverse)
    assert not torch.equal(draws[0].inverse, draws[2].inverse)


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


# Texts and contexts


class Words:
    """The interface of Hugging Face's tokenizers: a number a word, 1 before and 2 after the text."""

    pad_token_id, sep_token_id, bos_token_id, eos_token_id, cls_token_id = 0, 2, 1, 2, 3

    def __call__(self, texts, *, truncation, padding, add_special_tokens=True, max_length=0, **_):
        rows = [
            [10 + sum(map(ord, word)) for word in text.split()] for text in ([texts], texts)[isinstance(texts, list)]
        ]
        if add_special_tokens:
            rows = [[1, *(row[: max_length - 2] if truncation else row), 2] for row in rows]
        if padding == "max_length":
            rows = [row + [0] * (max_length - len(row)) for row in rows]
        ids = torch.tensor(rows) if padding else rows
        return Encoded(ids if isinstance(texts, list) else ids[0])


class Encoded(dict):
    def __init__(self, input_ids):
        super().__init__(input_ids=input_ids)
        self.input_ids = input_ids


def hugging_face(mode="", strip_sep_token=False):
    made = object.__new__(import_open_clip().tokenizer.HFTokenizer)
    made.tokenizer, made.context_length, made.clean_fn = Words(), 8, str.strip
    made.tokenizer_mode, made.strip_sep_token = mode, strip_sep_token
    return made


def simple(length=8, **arguments):
    return import_open_clip().SimpleTokenizer(context_length=length, **arguments)


def spelled(texts):
    """A callable that tells nothing: a letter a token, closed by 1, padded and cut to 8."""
    rows = [[ord(letter) for letter in text][:7] + [1] for text in texts]
    return torch.tensor([row + [0] * (8 - len(row)) for row in rows])


def unclosed(texts):
    return torch.tensor([[ord(letter) for letter in text.ljust(8)[:8]] for text in texts])


def bpe(texts):
    """open_clip's own tokenizer, hidden in a function."""
    return simple()(texts)


TOKENIZERS = {
    # a tokenizer, a text that just fits its context of 8, one that does not, and the latter's number of tokens
    "simple": (simple(), "one two three four five six", "one two three four five six seven", "9"),
    "exclamations": (simple(), "one two ! four ! six", "one two ! four ! six ! ! !", "11"),
    "masked": (
        simple(reduction_mask="simple"),
        "one two three four five six",
        "one two three four five six seven",
        "9",
    ),
    "hf": (hugging_face(), "a b c d e f", "a b c d e f g", "9"),
    "hf-strip": (hugging_face(strip_sep_token=True), "a b c d e f", "a b c d e f g", "9"),
    "hf-clips": (hugging_face("clips"), "a b c d e", "a b c d e f", "9"),
    "spelled": (spelled, "abc def", "abc defg", "more than 8"),
    "spelled-repeats": (spelled, "a a a a", "a a a a a", "more than 8"),
    "unclosed": (unclosed, "abc defg", "abc defg hi", "more than 8"),
    "bpe": (bpe, "one two three four five six", "one two three four five six.", "more than 8"),
    "bpe-in-a-word": (bpe, "one two three four five six ", "one two three four five zyxwvut", "more than 8"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_that_fit_are_tokenised_and_longer_ones_refused_by_class_and_number(name):
    tokenizer, fits, too_long, taken = TOKENIZERS[name]
    short = fits.split(" ")[0]
    assert torch.equal(tokenize(tokenizer, [fits, short]), tokenizer([fits, short]))
    match = f"1 of 2 texts .* context of 8 tokens .*'cow', '{too_long}' takes {taken}\\. .*truncate=True"
    with pytest.raises(ValueError, match=match):
        tokenize(tokenizer, [short, too_long], names=["ant", "cow"])


def test_truncation_may_be_asked_for_by_argument_or_by_tokenizer():
    texts = ["one two three four five six seven"]
    for tokenizer, truncate in ((simple(), True), (Truncating(simple()), False)):
        assert torch.equal(tokenize(tokenizer, texts, truncate=truncate), simple()(texts))
    assert Truncating(simple()).context_length == 8
    assert torch.equal(copy.deepcopy(Truncating(spelled))(["a"]), spelled(["a"]))


def test_tokenizers_whose_rows_grow_cut_nothing():
    def padded(texts):
        length = max(map(len, texts))
        return torch.tensor([[ord(letter) for letter in text] + [0] * (length - len(text)) for text in texts])

    assert tokenize(padded, ["a", "a long text"]).shape == (2, 11)


def test_tokenizers_that_know_their_own_texts_alone_are_not_asked_for_others():
    table = {"ant": [5, 6], "bee": [5, 7]}
    tokens = tokenize(lambda texts: torch.tensor([table[text] for text in texts]), ["ant", "bee"])
    assert torch.equal(tokens, torch.tensor([[5, 6], [5, 7]]))


@pytest.mark.parametrize("result", [[[1, 2]], torch.zeros(1, 2), torch.zeros(2, dtype=torch.long), None])
def test_what_is_no_tokenizer_is_named(result):
    with pytest.raises(TypeError, match="tokenizer: expected integers"):
        tokenize(lambda _: result, ["a"])


def test_classes_whose_different_captions_become_equal_are_refused_by_name():
    with pytest.raises(ValueError, match="'Jaguar' and 'jaguar' become the same tokens.*'a Jaguar' and 'a jaguar'"):
        PromptTable(simple(16), ["Jaguar", "cat", "jaguar"], ["a {}", "the {}"])
    with pytest.warns(UserWarning, match="'one two x' and 'one two y' become the same tokens"):
        PromptTable(simple(4), ["one two x", "one two y"], ["{}"], truncate=True)
    # Two spellings within a class, or of one of several captions, leave the classes apart.
    tokens, row = tokenize_classes(simple(16), [["Furry", "striped"], ["furry", "spotted"], ["furry", "Furry"]])
    assert len(tokens) == 4 and torch.equal(tokens[row["Furry"]], tokens[row["furry"]])


def test_every_place_that_tokenises_refuses_long_texts(clip_model, prompts, batches):
    from robustft import clip, zero_shot_classifier
    from robustft.methods import DRM, FLYP, CaRot, CoOp, FineTune, core_labels

    long = prompts | {"class_names": ("ant", "a bumblebee of the meadows", "cow")}
    described = {"ant": "six legs", "bee": "black and yellow stripes", "cow": "horns"}
    for call in (
        lambda: zero_shot_classifier(clip_model, **long),
        lambda: FineTune(clip_model, **long),
        lambda: FLYP(clip_model, **long),
        lambda: CaRot(clip_model, total_steps=9, **long),
        lambda: CoOp(clip_model, context=2, **long),
    ):
        with pytest.raises(ValueError, match="'a bumblebee of the meadows', '.*takes more than 15"):
            call()
    names = {"tokenizer": prompts["tokenizer"], "class_names": prompts["class_names"], "descriptions": described}
    for call in (
        lambda: DRM(clip_model, templates=prompts["templates"], **names),
        lambda: core_labels(clip_model, batches[0], **names),
    ):
        with pytest.raises(ValueError, match="'bee', 'black and yellow stripes' takes more than 15"):
            call()
    with pytest.raises(ValueError, match="'a very long caption' takes more than 15"):
        FLYP(clip_model, **prompts).step((batches[0][0], ["ant"] * 5 + ["a very long caption"]))
    with pytest.raises(ValueError, match="'a very long context' takes"):
        CoOp(clip_model, context="a very long context", **prompts)
    cut = clip.class_embeddings(clip_model, long["tokenizer"], long["class_names"], long["templates"], truncate=True)
    assert torch.equal(zero_shot_classifier(clip_model, truncate=True, **long).class_embeddings, cut.detach())
    FLYP(clip_model, **long | {"tokenizer": Truncating(long["tokenizer"])}).step(batches[0])


# Names


def test_names_of_folders_are_captions_under_a_warning_with_the_cure():
    for names in (["n01440764", "n01443537"], ["class_01", "cat"], ["001.Black_footed_Albatross"], ["12"]):
        with pytest.warns(UserWarning, match=f"'{names[0]}'.*'a {names[0]}'.*class_names="):
            captions(names, ["a {}"])


def test_names_in_words_or_digits_get_no_warning(recwarn):
    captions([*"0123456789", "boeing 747", "n95 mask", "classical guitar", "3D printer"], ["a {}"])
    captions(import_open_clip().IMAGENET_CLASSNAMES, ["a {}"])
    assert not recwarn.list


def test_classes_are_named_by_a_mapping_in_their_own_order():
    assert captions({"n02": "ant", "n01": "bee"}, ["a {}"]) == (("a ant",), ("a bee",))
    for blank in ({"n01": " "}, {"n01": 3}):
        with pytest.raises((ValueError, TypeError), match="class_names: entry 0"):
            captions(blank, ["a {}"])


# Published files


def test_names_of_a_data_set_among_others_are_asked_for(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"imagenet1k": ["tench", "goldfish"]}))
    assert prompts.read_class_names(path) == ("tench", "goldfish")
    path.write_text(json.dumps({"imagenet1k": ["tench", "goldfish"], "digits": ["zero", "one"]}))
    assert prompts.read_class_names(path, dataset="digits") == ("zero", "one")
    with pytest.raises(ValueError, match="names.json: 2 lists, 'imagenet1k', 'digits': say which, as dataset="):
        prompts.read_class_names(path)
    with pytest.raises(ValueError, match="names.json: no list called 'cars', there are 'imagenet1k', 'digits'"):
        prompts.read_class_names(path, dataset="cars")
    path.write_text(json.dumps({"imagenet1k": ["a {c}", "the {c}"]}))
    assert prompts.read_templates(path) == ("a {c}", "the {c}")
    path.write_text('["a {c}"]')
    with pytest.raises(ValueError, match="no object of lists"):
        prompts.read_templates(path, dataset="imagenet1k")


DAMAGED = {
    "number": b"3",
    "nested numbers": b"[[1], [2]]",
    "numbers": b"[1, 2]",
    "deep": b"[" * 100_000,
    "latin-1": '["\xe9t\xe9"]'.encode("latin-1"),
    "digits": b"[" + b"9" * 10_000 + b"]",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_json_of_another_shape_names_its_file(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    for read in (
        prompts.read_class_names,
        prompts.read_templates,
        lambda path: read_descriptions(path, ["ant", "bee"]),
    ):
        with pytest.raises(ValueError, match="file.json"):
            read(path)


def test_text_files_are_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\ufeffant\nbee\n", encoding="utf-8")
    assert prompts.read_class_names(path) == ("ant", "bee")
    path.with_suffix(".json").write_text('\ufeff["ant", "bee"]', encoding="utf-8")
    assert prompts.read_class_names(path.with_suffix(".json")) == ("ant", "bee")
    path.write_bytes("\xe9t\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="names.txt: no UTF-8 text .byte 0xe9 at 0.; expected class names"):
        prompts.read_class_names(path)


def test_classes_without_descriptions_are_described_by_their_names_where_asked(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"ant": "six legs", "bee": []}))
    with pytest.raises(ValueError, match="d.json: descriptions of 'bee': got none; missing=\"name\""):
        read_descriptions(path, ["ant", "bee"])
    assert read_descriptions(path, ["ant", "bee"], missing="name") == (("six legs",), ("a photo of a bee.",))
    with pytest.raises(ValueError, match="no description of 'cow'.*missing=\"name\""):
        match_descriptions({"ant": "x"}, ["ant", "cow"])
    assert match_descriptions({"ant": "x"}, ["ant", "cow"], missing="name")[1] == ("a photo of a cow.",)
    with pytest.raises(ValueError, match="no class called 'Cow'"):
        match_descriptions({"ant": "x", "Cow": "y"}, ["ant", "cow"], missing="name")
    with pytest.raises(ValueError, match='missing: expected "error" or "name"'):
        match_descriptions({"ant": "x"}, ["ant"], missing="skip")


def test_classes_of_equal_descriptions_are_named_in_a_warning(recwarn):
    with pytest.warns(UserWarning, match="4 of 5 classes .* apart: 'ant', 'emu'; 'bee', 'cow'"):
        match_descriptions(["x", ["y", "z"], ["z", "y"], "w", "x"], ["ant", "bee", "cow", "dog", "emu"])
    recwarn.clear()
    match_descriptions(["x", "x", "y"], ["crane", "crane", "ant"])  # equal classes may well have equal descriptions
    assert not recwarn.list


def test_objects_of_labels_give_names_in_the_order_of_the_labels(tmp_path):
    """Keras' and Hugging Face's files: {"bee": 1, "ant": 0} and {"1": "bee", "0": "ant"}."""
    file = tmp_path / "names.json"
    for content in ({"bee": 1, "cow": 2, "ant": 0}, {"2": "cow", "0": "ant", "1": "bee"}):
        file.write_text(json.dumps(content))
        assert prompts.read_class_names(file) == ("ant", "bee", "cow")
    for content, message in (
        ({"bee": 1, "ant": 1}, "numbers of the names are not 0 to 1"),
        ({"en": {"imagenet1k": ["ant"]}}, "'en' holds dict"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            prompts.read_class_names(file)
