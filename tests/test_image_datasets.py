"""Images for plain training: read right, in an order that ranks, resuming and workers do not change."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.errors import UserError
from guided_diffusion.image_datasets import (
    ArrayDataset,
    center_crop,
    list_images,
    open_dataset,
    read_image,
    sample_batches,
)
from guided_diffusion.io.npz_writer import create_npz
from guided_diffusion.spaces import PixelSpace


def numbered(count: int, size: int = 4, start: int = 0) -> np.ndarray:
    """Images [count, size, size, 3] whose pixels tell their number, below 65536."""
    images = np.zeros((count, size, size, 3), np.uint8)
    number = np.arange(start, start + count)
    images[..., 0], images[..., 1] = (number // 256)[:, None, None], (number % 256)[:, None, None]
    return images


def numbers_of(x: th.Tensor) -> list[int]:
    """The numbers of a batch of such images, uint8 [B, H, W, 3]."""
    pixels = x[:, 0, 0].long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def write_npz(path, images, labels=None) -> None:
    with create_npz(path, len(images)) as writer:
        writer.append(images, labels)


def write_images(folder, names, size=4) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered(1, size, i)[0]).save(path)


# --- archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_gives_its_images_and_labels(tmp_path, compressed):
    images, labels = numbered(300), np.arange(300) % 7
    path = tmp_path / "set.npz"
    if compressed:
        np.savez_compressed(path, images, labels.astype(np.uint8))
    else:
        np.savez(path, images, labels)
    dataset = open_dataset(path, 4, class_cond=True)
    assert isinstance(dataset, ArrayDataset)
    assert len(dataset) == 300 and dataset.num_classes == 7
    got, got_labels = dataset.batch(np.array([299, 0, 17, 17]))
    np.testing.assert_array_equal(got, images[[299, 0, 17, 17]])
    assert got.dtype == np.uint8
    assert got_labels.dtype == np.int64 and got_labels.tolist() == [5, 0, 3, 3]
    # The uncompressed one stays on disk.
    assert isinstance(dataset.arrays[0], np.memmap) is not compressed


def test_labels_are_not_needed_without_class_cond(tmp_path):
    write_npz(tmp_path / "set.npz", numbered(3))
    dataset = open_dataset(tmp_path / "set.npz", 4, class_cond=False)
    assert dataset.num_classes == 0
    assert dataset.batch(np.array([1, 2]))[1].tolist() == [0, 0]


def test_shards_follow_each_other_and_may_be_empty(tmp_path):
    start = 0
    for i, count in enumerate([0, 3, 0, 0, 5, 1, 0]):
        write_npz(tmp_path / f"{i}.npz", numbered(count, start=start), np.arange(start, start + count))
        start += count
    dataset = open_dataset(tmp_path, 4, class_cond=True)
    assert len(dataset) == 9 and dataset.num_classes == 9
    order = np.random.default_rng(0).permutation(9)
    images, labels = dataset.batch(order)
    np.testing.assert_array_equal(images, numbered(9)[order])
    np.testing.assert_array_equal(labels, order)


def bad_archives(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """name -> (path, what the message must tell)."""
    good = numbered(3)
    arrays: dict[str, tuple[dict[str, Any], str]] = {
        "other size": ({"arr_0": numbered(3, 5)}, r"uint8 \[3, 5, 5, 3\].*needs uint8 \[N, 4, 4, 3\]"),
        "not square": ({"arr_0": np.zeros((3, 4, 5, 3), np.uint8)}, r"\[3, 4, 5, 3\]"),
        "floats": ({"arr_0": good.astype(np.float32)}, "float32"),
        "channels first": ({"arr_0": good.transpose(0, 3, 1, 2).copy()}, r"\[3, 3, 4, 4\]"),
        "other name": ({"images": good}, "has no array 'arr_0'.*images"),
        "no labels": ({"arr_0": good}, "has no array 'arr_1'"),
        "too few labels": ({"arr_0": good, "arr_1": np.arange(2)}, "one label per image"),
        "float labels": ({"arr_0": good, "arr_1": np.arange(3.0)}, "must be integers"),
        "negative labels": ({"arr_0": good, "arr_1": np.array([0, -1, 2])}, "negative"),
        "objects": ({"arr_0": np.array([None] * 3)}, "no plain array"),
        "empty": ({"arr_0": good[:0], "arr_1": np.arange(0)}, "holds no images"),
    }
    for name, (content, told) in arrays.items():
        path = folder / f"{name}.npz"
        np.savez(path, **content)
        yield name, path, told
    whole = (folder / "no labels.npz").read_bytes()
    (folder / "truncated.npz").write_bytes(whole[:-40])
    yield "truncated", folder / "truncated.npz", "not a readable npz archive"
    (folder / "text.npz").write_text("hello")
    yield "text", folder / "text.npz", "not a readable npz archive"
    yield "missing", folder / "missing.npz", "no such dataset"


def test_bad_archives_are_refused_by_name(tmp_path):
    for name, path, told in bad_archives(tmp_path):
        with pytest.raises(UserError, match=told) as error:
            open_dataset(path, 4, class_cond=True)
        assert str(path) in str(error.value) and "\n" not in str(error.value), name


# --- folders ---------------------------------------------------------------------------------------


def test_images_beside_an_archive_are_told_to_be_left_out(tmp_path, capsys):
    write_npz(tmp_path / "set.npz", numbered(3))
    open_dataset(tmp_path, 4, class_cond=False)
    assert capsys.readouterr().err == ""
    write_images(tmp_path, ["a.png"])
    assert len(open_dataset(tmp_path, 4, class_cond=False)) == 3
    assert "images beside them are not read" in capsys.readouterr().err


def test_a_folder_per_class(tmp_path, capsys):
    write_images(tmp_path, ["zebra/b.png", "ant/10.png", "ant/2.bmp", "deep/er/bee/x.PNG"])
    (tmp_path / "ant/readme.txt").write_text("no image")
    dataset = open_dataset(tmp_path, 4, class_cond=True)
    images, labels = dataset.batch(np.arange(len(dataset)))
    assert images[:, 0, 0, 1].tolist() == [1, 2, 3, 0]  # in order of their paths
    assert capsys.readouterr().err == ""
    assert labels.tolist() == [0, 0, 1, 2]  # ant, bee, zebra
    assert dataset.num_classes == 3


def test_labels_that_may_be_meant_otherwise_are_told(tmp_path, capsys):
    write_images(tmp_path, ["part0/cat_0.png", "part0/dog_1.png", "part1/cat_2.png", "part1/dog_3.png"])
    assert open_dataset(tmp_path, 4, class_cond=True).labels.tolist() == [0, 0, 1, 1]
    assert "labels are the names of 2 folders" in capsys.readouterr().err


def test_images_beside_folders_of_images_have_no_class(tmp_path):
    write_images(tmp_path, ["dog_1.png", "bird_1.png", "sub/cat_1.png"])
    assert len(open_dataset(tmp_path, 4, class_cond=False)) == 3
    with pytest.raises(UserError, match="sub: images lie here and in a folder above"):
        open_dataset(tmp_path, 4, class_cond=True)


def test_links_to_folders_are_followed_where_their_images_do_not_lie_there_anyway(tmp_path):
    for folder in ("tree/cat", "elsewhere/dog", "elsewhere/emu"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    for name in ("dog", "eagle"):  # in sorted order the first one counts
        (tmp_path / "tree" / name).symlink_to("../elsewhere/dog")
    (tmp_path / "tree/ant").symlink_to("cat")
    (tmp_path / "tree/cat/up").symlink_to("../../tree")
    (tmp_path / "tree/other").symlink_to("../elsewhere")
    found = [path.relative_to(tmp_path / "tree") for path in list_images(tmp_path / "tree")]
    assert [str(path) for path in found] == ["cat/0.png", "dog/0.png", "other/emu/0.png"]


def test_the_evaluators_statistics_are_no_images(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "images.digits.ref-stats.npz", mu=np.zeros(3))
    assert len(open_dataset(str(tmp_path), 8, False)) == 2


def test_a_class_before_the_underscore(tmp_path):
    write_images(tmp_path, ["ship_00001.png", "cat_00000.png", "cat_00002.png"])
    dataset = open_dataset(tmp_path, 4, class_cond=True)
    images, labels = dataset.batch(np.arange(3))
    assert images[:, 0, 0, 1].tolist() == [1, 2, 0]
    assert labels.tolist() == [0, 0, 1] and dataset.num_classes == 2


def test_a_folder_without_what_is_needed_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such dataset"):
        open_dataset(tmp_path / "nothing", 4, class_cond=False)
    with pytest.raises(UserError, match="holds no images"):
        open_dataset(tmp_path, 4, class_cond=False)
    write_images(tmp_path, ["cat_1.png", "17.png"])
    assert len(open_dataset(tmp_path, 4, class_cond=False)) == 2
    with pytest.raises(UserError, match=r"17\.png: labels are needed"):
        open_dataset(tmp_path, 4, class_cond=True)


@pytest.mark.parametrize(
    "mode, color, suffix, wanted",
    [
        ("RGB", (250, 10, 20), "png", [250, 10, 20]),
        ("RGBA", (250, 10, 20, 255), "png", [250, 10, 20]),
        ("L", 77, "png", [77, 77, 77]),
        ("P", 3, "gif", [9, 10, 11]),
        ("CMYK", (0, 255, 255, 0), "jpg", [254, 0, 0]),
        ("1", 1, "png", [255, 255, 255]),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, color, suffix, wanted):
    image = Image.new(mode, (4, 4), color)
    if mode == "P":
        image.putpalette(bytes(range(30)))
    image.save(tmp_path / f"x.{suffix}")
    got = read_image(tmp_path / f"x.{suffix}", 4)
    assert got.shape == (4, 4, 3) and got.dtype == np.uint8
    np.testing.assert_allclose(
        got.astype(int), np.broadcast_to(wanted, (4, 4, 3)), atol=2 if suffix == "jpg" else 0
    )


def test_unreadable_images_are_named(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:1500])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("I;16", (4, 4), 60000).save(tmp_path / "deep.png")  # Pillow would make it 255
    for name in ["half.jpg", "text.png", "empty.png", "deep.png"]:
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name, 64)


# --- preprocessing ---------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_any_image_becomes_a_square_and_one_color_stays_it(width, height, size, value):
    got = center_crop(Image.new("RGB", (width, height), (value, 255 - value, 7)), size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.broadcast_to([value, 255 - value, 7], got.shape))


def test_an_image_of_the_right_size_is_left_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), 8), image)


def test_the_middle_of_the_longer_side_is_kept():
    image = np.random.default_rng(0).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(image), 8), image[:, 3:11])
    tall = image.transpose(1, 0, 2)
    np.testing.assert_array_equal(center_crop(Image.fromarray(tall), 8), tall[3:11])


def test_a_large_image_is_averaged_by_boxes_not_sampled():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    got = center_crop(Image.fromarray(image), 8)
    means = image.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(got - means).max() <= 2  # two halvings, each rounding rows and columns


@pytest.mark.parametrize("width, size", [(178, 64), (9, 36), (50, 40)])
def test_a_ramp_stays_a_ramp(width, size):
    ramp = np.broadcast_to(np.linspace(20, 235, width)[None, :, None], (width + 2, width, 3)).astype(np.uint8)
    got = center_crop(Image.fromarray(ramp), size).astype(float)
    wanted = np.interp((np.arange(size) + 0.5) * width / size - 0.5, np.arange(width), ramp[0, :, 0])
    inner = slice(size // 6, -size // 6)  # the border bends a little
    assert np.abs(got[:, inner] - wanted[None, inner, None]).max() < 2


# --- batches ---------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    write_npz(tmp_path / "set.npz", numbered(23), np.arange(23))
    return open_dataset(tmp_path / "set.npz", 4, class_cond=True)


def steps(dataset, batch_size, count, **options) -> list[list[int]]:
    batches = sample_batches(dataset, batch_size, seed=options.pop("seed", 0), **options)
    taken = []
    for x, y in itertools.islice(batches, count):
        assert numbers_of(x) == y.tolist()
        taken.append(y.tolist())
    return taken


def test_values_shapes_and_range(dataset):
    images, y = next(sample_batches(dataset, 5, seed=0))
    assert images.shape == (5, 4, 4, 3) and images.dtype == th.uint8
    x = PixelSpace(4).encode(images)
    assert x.shape == (5, 3, 4, 4) and x.dtype == th.float32 and x.is_contiguous()
    back = PixelSpace(4).decode(x)  # cut off, not rounded: a level may come back as the one below
    assert back.dtype == np.uint8 and 0 <= (images.numpy().astype(int) - back).max() <= 1
    assert y.shape == (5,) and y.dtype == th.int64
    assert x.min() == -1 and x.max() <= 1  # blue is 0 everywhere
    np.testing.assert_allclose(x[:, 1, 2, 3].numpy(), y.numpy() / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 23, 50])
def test_every_epoch_is_another_permutation(dataset, batch_size):
    flat = list(itertools.chain(*steps(dataset, batch_size, -(-4 * 23 // batch_size))))
    epochs = [flat[i * 23 : (i + 1) * 23] for i in range(4)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides(dataset):
    assert steps(dataset, 4, 6) == steps(dataset, 4, 6)
    assert steps(dataset, 4, 6, seed=1) != steps(dataset, 4, 6)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_what_one_process_sees(dataset, world_size):
    alone = steps(dataset, 12, 10)
    shares = [
        steps(dataset, 12 // world_size, 10, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("start", [1, 5, 6, 1000])
def test_starting_at_a_step_continues_the_sequence(dataset, start):
    whole = sample_batches(dataset, 5, seed=3, rank=1, world_size=2)
    wanted = [y.tolist() for _, y in itertools.islice(whole, start, start + 8)]
    assert steps(dataset, 5, 8, seed=3, rank=1, world_size=2, start_step=start) == wanted


def test_workers_change_nothing(dataset):
    options = {"rank": 1, "world_size": 2, "start_step": 2}
    state = th.get_rng_state()
    loaded = steps(dataset, 4, 9, num_workers=2, **options)
    assert th.equal(th.get_rng_state(), state)  # the loop's own random numbers stay what they were
    assert loaded == steps(dataset, 4, 9, **options)


def mirrored(dataset, batch_size, count, **options):
    """Of each image in turn, whether it was mirrored."""
    flags = []
    batches = sample_batches(dataset, batch_size, seed=3, random_flip=True, **options)
    for images, y in itertools.islice(batches, count):
        plain, _ = dataset.batch(y.numpy())
        for image, original in zip(images.numpy(), plain, strict=True):
            flags.append(bool((image == original[:, ::-1]).all()))
            assert flags[-1] != bool((image == original).all())
    return flags


def test_half_of_the_images_are_mirrored_by_seed_and_place_alone(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    write_npz(tmp_path / "set.npz", images, np.arange(23))
    dataset = open_dataset(tmp_path / "set.npz", 4, class_cond=True)
    alone = mirrored(dataset, 12, 200)
    assert 0.45 < np.mean(alone) < 0.55
    shares = [mirrored(dataset, 6, 200, rank=rank, world_size=2) for rank in range(2)]
    steps = [[share[6 * k : 6 * k + 6] for share in shares] for k in range(200)]
    assert [flag for both in steps for part in both for flag in part] == alone
    assert mirrored(dataset, 12, 20, start_step=180) == alone[-240:]
    assert mirrored(dataset, 12, 20, num_workers=2) == alone[:240]
    assert np.array_equal(dataset.batch(np.arange(23))[0], images)  # what is stored stays as it is


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_told_in_one_line(tmp_path, num_workers):
    write_images(tmp_path, ["a.png"])
    (tmp_path / "b.png").write_text("hello")
    batches = sample_batches(open_dataset(tmp_path, 4, False), 2, seed=0, num_workers=num_workers)
    with pytest.raises(UserError, match=r"b\.png: not a readable image") as error:
        next(batches)
    assert "\n" not in str(error.value)
