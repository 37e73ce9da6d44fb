"""Image files of every kind become 8-bit RGB, upright, or an error that names them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from robustft.data.images import as_rgb, read_image
from robustft.data.splits import PathDataset

RAMP = np.linspace(0, 65535, 12 * 10).round().astype(np.uint16).reshape(12, 10)
EIGHT = (RAMP / 257.0).round().astype(np.uint8)


def saved(folder, image, name="image.png", **options):
    image.save(folder / name, **options)
    return folder / name


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode, name", [("I;16", "a.png"), ("I;16", "a.tif"), ("I", "a.tif"), ("I;16B", "a.tif")])
def test_16_bits_of_grey_keep_their_whole_range(tmp_path, mode, name):
    values = {"I;16": RAMP, "I": RAMP.astype(np.int32), "I;16B": RAMP.astype(">u2")}[mode]
    path = saved(tmp_path, Image.frombytes(mode, (10, 12), values.tobytes()), name)
    with Image.open(path) as file:
        assert file.mode == mode
    assert np.array_equal(pixels(path), np.stack([EIGHT] * 3, axis=2))


@pytest.mark.parametrize("values", [np.float32(RAMP), np.int32(RAMP) * 4096, np.int32(RAMP) - 9])
def test_pixels_of_unknown_range_are_refused_by_file(tmp_path, values):
    with pytest.raises(ValueError, match="image.tif: .*what is white"):
        read_image(saved(tmp_path, Image.fromarray(values), "image.tif"))


@pytest.mark.parametrize("orientation, turned", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, np.rot90)])
def test_images_are_turned_upright(tmp_path, orientation, turned):
    upright = np.random.default_rng(0).integers(256, size=(12, 10, 3), dtype=np.uint8)
    stored = turned(upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)), upright)


def test_every_other_mode_is_what_pil_makes_of_it(tmp_path, recwarn):
    colours = Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 10, 4), dtype=np.uint8))
    grey = colours.convert("LA")
    palette = colours.convert("RGB").quantize(8)
    for number, (image, name, options) in enumerate(
        (
            (colours, "png", {}),
            (grey, "png", {}),
            (palette, "png", {"transparency": 0}),
            (palette, "png", {"transparency": bytes(range(0, 160, 20))}),
            (colours.convert("CMYK"), "jpg", {}),
            (colours.convert("L"), "png", {}),
            (colours.convert("1"), "png", {}),
        )
    ):
        path = saved(tmp_path, image, f"{number}.{name}", **options)
        found = pixels(path)
        assert not recwarn.list  # PIL warns of palettes with transparencies
        with Image.open(path) as file:
            assert np.array_equal(found, np.asarray(file.convert("RGB"))), (image.mode, options)
        recwarn.clear()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, beside its error
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.webp"])
def test_damaged_images_name_their_file(tmp_path, name):
    path = saved(
        tmp_path, Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)), name
    )
    whole = path.read_bytes()
    for content in (b"", b"no image", whole[: len(whole) // 2], whole[:20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: damaged, or no image"):
            read_image(path)


def test_missing_images_stay_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_image(tmp_path / "none.png")


def test_data_sets_of_paths_read_their_images_here(tmp_path):
    path = saved(tmp_path, Image.fromarray(RAMP))
    data = PathDataset(((path, 0),), ("grey",))
    assert np.array_equal(np.asarray(data[0][0])[..., 0], EIGHT)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="image.png"):
        data[0]


def test_decoded_images_are_read_as_their_files_are(tmp_path):
    """What a pipeline is given, and what Hugging Face decodes."""
    sixteen = Image.fromarray(RAMP)
    turned = saved(tmp_path, Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), "turned.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(turned).save(turned, exif=exif)
    for path in (saved(tmp_path, sixteen), turned):
        assert np.array_equal(np.asarray(as_rgb(Image.open(path), "it")), np.asarray(read_image(path)))
    with pytest.raises(ValueError, match="it: floating point pixels"):
        as_rgb(Image.fromarray(np.zeros((2, 2), np.float32)), "it")
