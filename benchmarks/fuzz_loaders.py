"""Every loader against damaged files: each loads, or says in an error which file it is and what is wrong with it.

    python -m benchmarks.fuzz_loaders --files 10000      # results/fuzz_loaders.json: a count for each loader

A small whole file is written for each loader, changed in one of the ways of `mutate`, and read in a process of its own
under a limit of memory. That process must not die, hang, take more memory than `SPARE`, start a program or write
outside of the file's folder; and what carries checksums must load as it was or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import select
import struct
import sys
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustft import calibration, clip, data, methods
from robustft.calibration.calibrators import load as load_calibrator
from robustft.clip.prompts import read_class_names, read_descriptions, read_templates
from robustft.data.families import imagenet_synsets
from robustft.data.iconworld import build, world
from robustft.data.images import read_image
from robustft.data.paths import Member, PathDataset
from robustft.data.shards import read_shards
from robustft.data.splits import read_split
from robustft.data.table import read_table
from robustft.detection import Detector
from robustft.evaluation.results import read_evaluation
from robustft.files import write_file, write_json, write_text
from robustft.methods.clip_adapter import AdapterClassifier
from robustft.methods.cocoop import CoCoOpClassifier
from robustft.methods.maple import MaPLeClassifier
from robustft.methods.tip_adapter import CacheClassifier
from robustft.neighbors import NeighborIndex
from robustft.predictors import DualClassifier, Predictor
from robustft.training.checkpoint import latest_checkpoint, save_checkpoint
from robustft.training.run import configured

from . import machine

SPARE = 512 << 20
"""Bytes of memory that a loader may take: torch's own tens of MB, and some thousand times the files here."""
SECONDS = 60
"""After which a loader hangs, on a busy machine too."""

NAMES = ["ant", "bee", "cow"]
CONFIG = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1},
        "text_cfg": {"context_length": 15, "vocab_size": 30, "width": 8, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


@dataclass(frozen=True)
class Loader:
    """A whole file, and what reads it; `exact`: it carries checksums, so nothing else than its content may load.
    An error names the file, or its folder, or the `folder` that was opened."""

    path: Path
    load: Callable[[], object]
    exact: bool = False
    folder: Path | None = None


# The whole files


def loaders(folder: Path) -> dict[str, Loader]:
    """A loader of each kind, by name, each with its own folder."""
    torch.manual_seed(0)
    made: dict[str, Loader] = {}
    for make in (_checkpoints, _predictors, _fitted, _caches, _drawings, _texts, _data):
        made |= make(folder)
    return made


def _checkpoints(folder: Path) -> dict[str, Loader]:
    made = {}
    for part in ("state.safetensors", "state.json", "SHA256"):
        own = folder / f"checkpoint-{part}"
        saved = save_checkpoint(own, 3, {"method.a": torch.randn(4, 3)}, {"config": {"lr": 0.1}})
        made[f"checkpoint: {part}"] = Loader(saved / part, partial(latest_checkpoint, own), exact=True)
    return made


def _model() -> torch.nn.Module:
    cfg: Any = CONFIG["model_cfg"]
    return clip.import_open_clip().CLIP(cfg["embed_dim"], dict(cfg["vision_cfg"]), dict(cfg["text_cfg"])).eval()


def _heads(model: torch.nn.Module) -> dict[str, Predictor]:
    """A predictor of each kind that has one model."""
    head, scale, labels = torch.randn(3, 8), torch.tensor(7.5), torch.arange(6) % 3
    fixed: dict[str, Any] = {"class_embeddings": head, "logit_scale": scale}
    tokens = torch.cat([torch.randint(1, 29, (3, 4)), torch.full((3, 1), 29), torch.zeros(3, 10, dtype=torch.int64)], 1)
    net = {"narrow_weight": torch.randn(2, 8), "narrow_bias": torch.randn(2)}
    net |= {"shift_weight": torch.randn(8, 2), "shift_bias": torch.randn(8), "context": torch.randn(2, 8)}
    places = torch.tensor([[1, 2]] * 3)
    return {
        "dual head": DualClassifier(model, head, torch.randn(3, 8), NAMES, beta=0.3),
        "adapter": AdapterClassifier(model, NAMES, ratio=0.2, down=torch.randn(2, 8), up=torch.randn(8, 2), **fixed),
        "cache": CacheClassifier(model, NAMES, alpha=1.0, beta=5.0, keys=torch.randn(6, 8), labels=labels, **fixed),
        "conditional prompts": CoCoOpClassifier(model, NAMES, tokens=tokens, positions=places, **net),
        "deep prompts": MaPLeClassifier(model, NAMES, prompts=torch.randn(1, 2, 16), **fixed),
    }


def _ensembles(model: torch.nn.Module) -> dict[str, Predictor]:
    """A predictor of each kind that has members."""
    one, two = (methods.Classifier(model, torch.randn(3, 8), NAMES, logit_scale=7.5) for _ in range(2))
    return {
        "mixture": methods.OutputEnsemble(one, two).at(0.4),
        "temperature": methods.Tempering(DualClassifier(model, torch.randn(3, 8), torch.randn(3, 8), NAMES)).at(2.0),
        "VRF of two": _vrf().classifier(one, two),
    }


def _predictors(folder: Path) -> dict[str, Loader]:
    model = _model()
    one = methods.Classifier(model, torch.randn(3, 8), NAMES, logit_scale=7.5)
    images = torch.randn(2, 3, 8, 8)

    def used(saved: Path) -> Tensor:
        """What loads must also be able to predict."""
        return methods.load_predictor(saved).logits(images)

    made = {}
    for file in (clip.CLASSIFIER_FILE, clip.CONFIG_FILE, clip.WEIGHTS_FILE):
        saved = one.save(folder / f"predictor-{file}", CONFIG)
        made[f"predictor: {file}"] = Loader(saved / file, partial(used, saved))
    for name, predictor in _heads(model).items():
        saved = predictor.save(folder / name, CONFIG)
        made[f"predictor: {name}"] = Loader(saved / clip.CLASSIFIER_FILE, partial(used, saved))
    for name, predictor in _ensembles(model).items():
        saved = predictor.save(folder / name, CONFIG)
        made[f"ensemble: {name}"] = Loader(saved / "ensemble.safetensors", partial(used, saved))
    exported = clip.export(model, folder / "model", CONFIG)
    weights = folder / "weights" / "weights.pt"
    content = BytesIO()
    torch.save(model.state_dict(), content)
    write_file(weights, content.getvalue())
    made["state dict"] = Loader(weights, partial(clip.load, f"local-dir:{exported}", weights))
    return made


def _outputs() -> clip.Outputs:
    labels = torch.arange(60) % 3
    return clip.Outputs(
        logits=torch.randn(60, 3) + torch.nn.functional.one_hot(labels),
        cosines=torch.rand(60, 3),
        features=torch.nn.functional.normalize(torch.randn(60, 8), dim=1),
    ).replace(labels=labels)


def _vrf() -> methods.VRF:
    outputs = _outputs()
    better = 2.0 * torch.nn.functional.one_hot(outputs.labels) * (torch.arange(60) % 2)[:, None]
    features = methods.VRFFeatures(outputs.only("logits"), outputs.replace(logits=outputs.logits + better))
    return methods.VRF(temperatures=(1.2, 0.8)).fit(features, features)


def _fitted(folder: Path) -> dict[str, Loader]:
    outputs = _outputs()
    made = {}
    for kind in ("TemperatureScaling", "VectorScaling", "IsotonicCalibration", "HistogramBinning"):
        path = getattr(calibration, kind)().fit(outputs.logits, outputs.labels).save(folder / f"{kind}.safetensors")
        made[f"calibrator: {kind}"] = Loader(path, partial(load_calibrator, path))
    classes, negatives = (torch.nn.functional.normalize(torch.randn(count, 8)) for count in (3, 5))
    outputs = outputs.replace(cosines=outputs.features @ classes.T)
    options: dict[str, Any] = {"neg_label": {"negative_embeddings": negatives}}
    options["ada_neg"] = {"negative_embeddings": negatives, "class_embeddings": classes, "groups": 1}
    for score in ("mcm", "knn", "mahalanobis", "neg_label", "ada_neg"):
        detector = Detector(score, **options.get(score, {})).fit(outputs, validation=outputs)
        path = detector.save(folder / f"detector-{score}.safetensors")
        made[f"detector: {score}"] = Loader(path, partial(_scored, path, outputs))
    path = folder / "index.safetensors"
    NeighborIndex(torch.randn(20, 4)).save(path)
    made["neighbour index"] = Loader(path, partial(NeighborIndex.load, path))
    path = _vrf().save(folder / "vrf.safetensors")
    made["VRF"] = Loader(path, partial(methods.VRF.load, path))
    return made


def _drawings(folder: Path) -> dict[str, Loader]:
    path = folder / "drawings.xz"
    palettes = np.zeros((2, world.COLOURS, 3), np.uint8)
    pixels = np.random.default_rng(0).integers(world.COLOURS, size=(2, world.SIZE, world.SIZE), dtype=np.uint8)
    drawn = [build.Drawing("noto", "eagle", "1F985"), build.Drawing("tabler", "box", "")]
    told = {"concepts": {"1F985": ["eagle", "bird", "test"]}, "classes": ["1F985"]}
    write_file(path, build.packed(drawn, told, palettes, pixels))
    return {"drawings": Loader(path, partial(world.drawings.__wrapped__, path), exact=True)}


def _scored(path: Path, outputs: clip.Outputs) -> Detector:
    detector = Detector.load(path)
    detector.scores(outputs)
    return detector


def _caches(folder: Path) -> dict[str, Loader]:
    images = torch.randn(6, 3, 8, 8), torch.arange(6)
    kept = folder / "cache"
    encode = partial(clip.encode, _model(), images, cache=kept)
    encode()
    return {"feature cache": Loader(next(kept.iterdir()), encode, exact=True)}


def _texts(folder: Path) -> dict[str, Loader]:
    made = {}

    def text(name: str, file: str, value: Any, load: Callable[[Path], object]) -> None:
        path = folder / name / file
        write_text(path, value) if isinstance(value, str) else write_json(path, value)
        made[name] = Loader(path, partial(load, path))

    text("class names: JSON", "names.json", {"set": NAMES}, read_class_names)
    text("class names: lines", "names.txt", "\n".join(NAMES), read_class_names)
    text("templates: JSON", "templates.json", ["a {}", "the {c}."], read_templates)
    text("templates: lines", "templates.txt", "a {}\nthe {c}.", read_templates)
    descriptions = {name: [f"a {name} with legs", f"small {name}"] for name in NAMES}
    text("descriptions", "d.json", descriptions, partial(read_descriptions, class_names=NAMES))
    rows = [[f"{name}/{i}.jpg", label, name] for label, name in enumerate(NAMES) for i in range(2)]
    text("split", "split.json", {"train": rows, "val": rows[:2], "test": rows}, partial(read_split, root=folder))
    text("metrics.json", "metrics.json", _metrics(), read_evaluation)
    config: dict[str, Any] = {"seed": 0, "lr": 0.1, "recipes": {"FT": {"epochs": 3}}}
    own = folder / "run"
    with configured(own, config, resume=False):
        pass

    def resume() -> None:
        with configured(own, config, resume=True):
            pass

    made["config.yaml"] = Loader(own / "config.yaml", resume, exact=True)
    return made


def _metrics() -> dict[str, Any]:
    from robustft.evaluation import evaluate_predictions
    from robustft.evaluation.results import Suite

    outputs = clip.Outputs(logits=torch.randn(40, 3), cosines=torch.rand(40, 3), labels=torch.arange(40) % 3)
    suite = Suite(outputs, {"night": outputs}, {"other": outputs})
    return json.loads(json.dumps(evaluate_predictions({"zero-shot": suite}).to_dict()))


def _data(folder: Path) -> dict[str, Loader]:
    table = folder / "table" / "table.csv"
    write_text(table, "path,label\n" + "".join(f"{name}.jpg,{name}\n" for name in NAMES))
    lines = folder / "lines" / "table.jsonl"
    write_text(lines, "".join(json.dumps({"path": f"{name}.jpg", "label": name}) + "\n" for name in NAMES))
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for i in range(3):
            for suffix, value in ((".jpg", b"image"), (".json", json.dumps({"label": i}).encode())):
                info = tarfile.TarInfo(f"{i:03d}{suffix}")
                info.size = len(value)
                archive.addfile(info, BytesIO(value))
    shard = folder / "shards" / "a.tar"
    write_file(shard, content.getvalue())
    names = folder / "named" / "classnames.txt"
    write_file(names.with_name("a.tar"), content.getvalue())
    write_text(names, "\n".join(NAMES))
    split = folder / "split" / "split.csv"
    write_text(split, "path,label,split\n" + "".join(f"{n}{p}.jpg,{n},{p}\n" for n in NAMES for p in ("train", "test")))
    return {
        "table: CSV": Loader(table, partial(read_table, table)),
        "table: JSON lines": Loader(lines, partial(read_table, lines)),
        "table: split": Loader(split, partial(data.open, split)),
        "shard": Loader(shard, partial(read_shards, str(shard))),
        "shard: class names": Loader(names, partial(read_shards, str(names.with_name("a.tar")))),
        **_images(folder),
        **_objectnet(folder),
        **_hugging_face(folder),
    }


def _images(folder: Path) -> dict[str, Loader]:
    """Image files, and one inside an archive."""
    from PIL import Image

    made = {}
    picture = Image.effect_noise((24, 16), 60).convert("RGB")
    for suffix in ("png", "jpg", "tif", "gif", "webp", "bmp"):
        path = folder / "images" / f"a.{suffix}"
        content = BytesIO()
        picture.save(content, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
        write_file(path, content.getvalue())
        made[f"image: {suffix}"] = Loader(path, partial(read_image, path))
    member = PathDataset(((Member(path, "a.bmp", 0, len(content.getvalue())), 0),), ("ant",))
    return made | {"image: member": Loader(path, partial(member.__getitem__, 0))}


def _objectnet(folder: Path) -> dict[str, Loader]:
    """ObjectNet's release; what its mappings are called stands in `robustft.data.families`."""
    root = folder / "objectnet"
    write_file(root / "images" / "alarm_clock" / "a.png", b"")
    texts = {
        "folder_to_objectnet_label.json": json.dumps({"alarm_clock": "Alarm clock"}),
        "objectnet_to_imagenet_1k.json": json.dumps({"Alarm clock": "analog clock; digital clock"}),
        "pytorch_to_imagenet_2012_id.json": json.dumps({"0": 0, "1": 1}),
        "imagenet_to_label_2012_v2": "analog clock\ndigital clock\n",
    }
    for name, value in texts.items():
        write_text(root / "mappings" / name, value)
    imagenet_synsets()  # whose list lies in none of these files
    return {f"ObjectNet: {name}": Loader(root / "mappings" / name, partial(data.open, root)) for name in texts}


def _hugging_face(folder: Path) -> dict[str, Loader]:
    """A data set that Hugging Face's `datasets` saved, where that is installed."""
    if find_spec("datasets") is None:
        return {}
    import datasets
    from PIL import Image

    root = folder / "hugging-face"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = BytesIO()
    Image.effect_noise((8, 8), 60).convert("RGB").save(content, "png")
    rows = {"image": [{"bytes": content.getvalue(), "path": None}] * 6, "label": [0, 1, 2] * 2}
    table = datasets.table.InMemoryTable.from_pydict(rows, features.arrow_schema)
    saved = datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint="whole")
    datasets.disable_progress_bars()
    datasets.DatasetDict(train=saved).save_to_disk(root)
    files = [root / "dataset_dict.json", *sorted(path for path in (root / "train").iterdir())]

    def read() -> object:
        return [item for item in data.open(root).train]

    return {f"Hugging Face: {path.name}": Loader(path, read, folder=root) for path in files}


# Damage

VALUES: list[Any] = [
    None, True, -1, 0, 1, 0.5, 10**6, 10**9, 2**31, 2**63, -(2**70), 10**400, 1e308, -1e-320, float("nan"),
    float("inf"), "", " ", "x" * 10_000, "\0", "\ud800", "é", "../../x", [], [[]], {}, [0] * 1000, {"": None},
]  # fmt: skip


class Program:
    """A pickle that starts a program where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


HOSTILE = [
    pickle.dumps(Program()), b"!!python/object/apply:os.system ['true']\n", b"\xff\xfe\x00{", b"[" * 100_000,
    b'{"a":' * 100_000, b"", b"\0" * 64, b"{}", b"[]", b"null", b"1", b"NaN", b'""', b"\xef\xbb\xbf",
    b"[1" + b"0" * 9000,
    struct.pack("<Q", 2**63) + b"{", struct.pack("<Q", 10**9) + b"{}", struct.pack("<Q", 2) + b"{}",
]  # fmt: skip


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The file's content, changed: bits, lengths, values and shapes of JSON and tensors, or something hostile."""
    ways = [_flip, _cut, _overwrite, _insert, _hostile, _flip, _cut]
    if _header(data) is not None:
        ways += [_change_header, _change_settings, _change_numbers] * 2
    elif data[:1] in b"{[":
        ways += [_change_json] * 6
    return chance.choice(ways)(data, chance)


def _flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def _overwrite(data: bytes, chance: random.Random) -> bytes:
    first = chance.randrange(len(data))
    count = min(chance.choice((1, 8, 100)), len(data) - first)
    return (
        data[:first] + chance.choice((bytes(count), b"\xff" * count, chance.randbytes(count))) + data[first + count :]
    )


def _insert(data: bytes, chance: random.Random) -> bytes:
    first = chance.randrange(len(data) + 1)
    return data[:first] + chance.choice((chance.randbytes(9), b"\n", data[:50], b"\xff", b'"', b"\0")) + data[first:]


def _hostile(data: bytes, chance: random.Random) -> bytes:
    return chance.choice(HOSTILE)


def _change_json(data: bytes, chance: random.Random) -> bytes:
    try:
        return json.dumps(_changed(json.loads(data), chance)).encode()
    except ValueError:  # a line of JSON after another
        first, _, rest = data.partition(b"\n")
        return json.dumps(_changed(json.loads(first), chance)).encode() + b"\n" + rest


def _header(data: bytes) -> dict[str, Any] | None:
    """The header of a safetensors file."""
    try:
        return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) if data[8:9] == b"{" else None
    except ValueError:
        return None


def _with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def _change_header(data: bytes, chance: random.Random) -> bytes:
    header = json.loads(json.dumps(_header(data)))
    tensors = [name for name in header if name != "__metadata__"]
    if not tensors or chance.random() < 0.4:
        return _with_header(data, _changed(header, chance))
    entry = header[chance.choice(tensors)]
    if chance.random() < 0.5:  # of the same number of bytes, so that it loads
        entry["dtype"] = {"F32": "I32", "F64": "I64", "I64": "F64"}.get(entry["dtype"], "U8")
    else:
        entry["shape"] = chance.choice(([*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1]))
    return _with_header(data, header)


def _change_settings(data: bytes, chance: random.Random) -> bytes:
    header = _header(data) or {}
    found = header.get("__metadata__")
    if not isinstance(found, dict) or "robustft" not in found:
        return _change_header(data, chance)
    changed = _changed(json.loads(found["robustft"]), chance)
    text = chance.choice(("[" * 50_000, '{"kind":' * 50_000)) if chance.random() < 0.05 else json.dumps(changed)
    return _with_header(data, header | {"__metadata__": {"robustft": text}})


def _change_numbers(data: bytes, chance: random.Random) -> bytes:
    header = _header(data) or {}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    if not entries:
        return _change_settings(data, chance)
    entry = chance.choice(entries)
    begin, end = entry["data_offsets"]
    kind, size = {"F64": ("<d", 8), "F32": ("<f", 4), "F16": ("<e", 2), "I64": ("<q", 8)}.get(entry["dtype"], ("B", 1))
    wrong = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0) if kind in "<d<f<e" else (0, 1, 2**7)
    value = struct.pack(kind, chance.choice(wrong))
    first = 8 + struct.unpack("<Q", data[:8])[0] + begin
    count = (end - begin) // size
    if chance.random() < 0.5:
        return data[:first] + value * count + data[first + count * size :]
    first += chance.randrange(max(count, 1)) * size
    return data[:first] + value + data[first + size :]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _changed(value: Any, chance: random.Random) -> Any:
    """The value with one of its parts replaced, removed, doubled, nested or renamed; this changes it in place."""
    places = list(_places(value))
    if not places or chance.random() < 0.05:
        return chance.choice(VALUES)
    for _ in range(chance.choice((1, 1, 3))):
        inside, key = chance.choice(places)
        match chance.randrange(6):
            case 0 if isinstance(inside, dict):
                inside.pop(key, None)
            case 1 if isinstance(inside, list) and key < len(inside):
                inside.append(inside[key])
            case 2 if isinstance(inside, dict) and key in inside:
                inside["other"] = inside[key]
            case _ if isinstance(inside, dict) or key < len(inside):
                inside[key] = chance.choice(VALUES)
    return value


# Reading

_watched: list[Path] = []
_seen: list[str] = []
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "os.link", "shutil.rmtree")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in _PROGRAMS:
        _seen.append(event)
    elif event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
        path = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return  # a name in a folder that is open: `shutil.rmtree` was seen with that folder's path
        if isinstance(path, (str, bytes)) and not os.path.realpath(os.fsdecode(path)).startswith(f"{_watched[0]}/"):
            if os.fsdecode(path) != os.devnull:
                _seen.append(f"{event} of {os.fsdecode(path)!r:.80}")


@contextmanager
def _observed(folder: Path) -> Iterator[list[str]]:
    """What happens meanwhile: programs started, and writing outside of a folder."""
    _seen.clear()
    _watched.append(folder)
    try:
        yield _seen
    finally:
        _watched.clear()


def same(a: Any, b: Any) -> bool:
    """Whether two loaded things are equal, in their tensors too."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return same(vars(a), vars(b)) if hasattr(a, "__dataclass_fields__") else bool(a == b)


def judge(loader: Loader, whole: object, folder: Path) -> str:
    """ "loaded", "refused", or what is wrong with how the loader took its file."""
    with _observed(folder) as seen:
        try:
            found = loader.load()
        except (ValueError, OSError) as error:
            text = str(error)
            named = loader.path.name in text or (loader.folder or loader.path.parent).name in text
            outcome = "refused" if named else f"does not name the file: {type(error).__name__}: {text:.200}"
            if "can't allocate" in text or "MemoryError" in text:
                outcome = f"memory: {text:.200}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error):.200}"
        else:
            outcome = "loaded" if not loader.exact or same(found, whole) else "loads something else"
    return f"does {seen[0]}" if seen else outcome


def _work(names: list[str], made: dict[str, Loader], folder: Path, seed: int, numbers: range, answers: int) -> None:
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(folder)
    sys.addaudithook(_audit)
    factory: Any = sys.modules["open_clip.factory"]
    factory.SimpleTokenizer = cache(factory.SimpleTokenizer)  # whose vocabulary is in none of these files
    whole = {name: loader.path.read_bytes() for name, loader in made.items()}
    expected = {name: loader.load() if loader.exact else None for name, loader in made.items()}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + SPARE, -1))
    for number in numbers:
        name = names[number % len(names)]
        loader = made[name]
        loader.path.write_bytes(mutate(whole[name], random.Random(f"{seed} {number}")))
        outcome = judge(loader, expected[name], folder)
        loader.path.write_bytes(whole[name])
        os.write(answers, f"{json.dumps([number, outcome])}\n".encode())


def fuzz(files: int, seed: int = 0, only: str = "") -> tuple[dict[str, Counter[str]], list[tuple[str, int, str]]]:
    """Counts of what loaded and what was refused, for each loader, and the failures: loader, number, what."""
    counts: dict[str, Counter[str]] = {}
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        made = loaders(folder)
        names = [name for name in made if only in name]
        for name in names:
            made[name].load()  # whole, it loads
        whole = {name: made[name].path.read_bytes() for name in names}
        number = 0
        while number < files:
            numbers = range(number, files)
            for number, outcome in _answers(partial(_work, names, made, folder, seed, numbers), numbers):
                name = names[number % len(names)]
                kind = outcome if outcome in ("loaded", "refused") else "failed"
                counts.setdefault(name, Counter())[kind] += 1
                if kind == "failed":
                    failures.append((name, number, outcome))
            number += 1
            for name in names:
                made[name].path.write_bytes(whole[name])
    return counts, failures


def _answers(work: Callable[[int], None], numbers: range) -> Iterator[tuple[int, str]]:
    """What a child says of one file after another, the last time that it died or hung with the next one."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            work(send)
        finally:
            os._exit(0)
    os.close(send)
    last, rest, why = numbers.start - 1, b"", "hangs"
    while select.select([receive], [], [], SECONDS)[0]:
        if not (part := os.read(receive, 65536)):
            why = "dies"
            break
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            last, outcome = json.loads(line)
            yield last, outcome
    os.close(receive)
    if why == "hangs":
        os.kill(child, 9)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if last + 1 < numbers.stop:
        yield last + 1, f"{why} (status {status})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only loaders with this in their name; nothing is written then")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts, failures = fuzz(options.files, options.seed, options.only)
    for name, count in counts.items():
        print(f"{name:42} {dict(count)}")
    for name, number, outcome in failures:
        print(f"{name}, file {number}: {outcome!a}")
    if not options.only:
        command = f"python -m benchmarks.fuzz_loaders --files {options.files} --seed {options.seed}"
        machine.write("fuzz_loaders", command, {"failures": failures, "loaders": counts})
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
