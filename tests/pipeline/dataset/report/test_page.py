from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from depthvar.errors import InputError
from jobs.report import main
from pipeline.dataset.report.page import data_uri, depth_strip, render
from pipeline.dataset.report.survey import Picture, survey
from pipeline.storage import Storage
from tests.fake_shards import WITH_DEPTH_MAPS, fake_batch, make_plan, write_dataset

NAMES = ("zero & more", '<b>"one"</b>', "two", "</title><script>alert(1)</script>")


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.text += " "

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    plan = make_plan({0: 8, 1: 6, 3: 8}, class_names=NAMES)
    write_dataset(Storage.open(folder / "out"), plan, folder / "scratch")
    return folder / "out"


@pytest.fixture(scope="module")
def html(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "page.html"
    assert main([str(dataset), "--out", str(file)]) == 0
    return file.read_text()


def test_a_report_stands_in_the_dataset_and_is_the_same_each_time(
    dataset: Path, html: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(dataset, tmp_path / "out")
    assert main([str(copy)]) == 0
    line = f"report    {copy}/report.html: 22 of 22 images committed, 0 problems\n"
    assert capsys.readouterr().out == line
    written = (copy / "report.html").read_text()
    assert written.replace(str(copy), str(dataset)) == html


def test_a_page_needs_nothing_but_itself(html: str):
    page = Page(html)
    assert {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"} == set()
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= {f"#{i}" for i in ids(page)}
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def ids(page: Page) -> list[str]:
    return [i for _, attributes in page.elements if (i := attributes.get("id"))]


def test_names_are_text_and_never_markup(html: str):
    page = Page(html)
    for name in (NAMES[0], NAMES[1], NAMES[3]):
        assert name in page.text
    assert "<b>" not in html
    assert "<script" not in html


def test_images_and_figures_have_words_and_links_a_target(html: str):
    page = Page(html)
    assert all(image["alt"] for image in page.all("img"))
    charts = [figure for figure in page.all("figure") if figure.get("role") == "img"]
    assert len(charts) == len(page.all("svg")) == 8
    assert all(figure["aria-label"] for figure in charts)
    assert len(ids(page)) == len(set(ids(page)))
    targets = [str(link["href"])[1:] for link in page.all("a")]
    assert len(targets) == 6
    assert set(targets) <= set(ids(page))


def test_figures_take_the_colours_of_the_page(html: str):
    used = set(re.findall(r"var\(--([a-z]+)\)", html))
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    for palette in (light, dark):
        assert used == set(re.findall(r"--([a-z]+):", palette))
    assert "#0101" not in html


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: the ratio of the relative luminances of two colours `#rrggbb`."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_on_both_grounds_in_light_and_dark(html: str):
    for palette in re.findall(r":root \{(.*?)\}", html, re.DOTALL):
        colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", palette))
        for text in ("ink", "soft", "main", "bad", "good"):
            for ground in ("paper", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_the_pictures_are_the_pixels_of_the_samples(html: str):
    plan = make_plan({0: 8, 1: 6, 3: 8}, class_names=NAMES)
    images = Page(html).all("img")
    assert len(images) == 22 + 2 * 11
    for image in images:
        index = int(str(image["title"]))
        data = base64.b64decode(str(image["src"]).partition("base64,")[2])
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        assert (pixels == fake_batch(plan, [index]).images_BHWC[0, :, :, 0]).all()
        label = int(plan.total_counts.labels(index, index + 1)[0])
        assert image["alt"] == f"{NAMES[label]}, sample {index:012d}"


def test_numbers_are_those_of_plan_and_records(html: str):
    words = Page(html).words
    assert "fake: 22 images of 3 classes" in words
    assert "complete 3 of 3 shards" in words
    assert "43% of full depth's operations; 34% of its token-layers" in words
    assert "All other bytes were not read again for this report" in words
    assert f"{NAMES[1]} 6 0.00 " in words
    assert "sampling 0.0795, decoding 0.0398" in words  # seven batches of 0.25 and 0.125 s
    assert "policy.preset depthvar" in words
    assert "torch 2 " in words


def test_what_is_not_finished_or_damaged_is_on_the_page_and_in_the_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copy = shutil.copytree(dataset, tmp_path / "out")
    (copy / "commits" / "00001.json").unlink()
    rows = copy / "meta" / "00002.parquet"
    rows.write_bytes(b"x" * rows.stat().st_size)
    assert main([str(copy)]) == 0
    assert "13 of 22 images committed, 1 problems" in capsys.readouterr().out
    words = Page((copy / "report.html").read_text()).words
    assert "not finished 2 of 3 shards" in words
    assert "13 of 22 planned" in words
    assert "meta/00002.parquet: the Parquet is damaged" in words


def test_a_dataset_without_a_shard_has_a_page(dataset: Path, tmp_path: Path):
    copy = shutil.copytree(dataset, tmp_path / "out")
    shutil.rmtree(copy / "commits")
    assert main([str(copy)]) == 0
    words = Page((copy / "report.html").read_text()).words
    assert "0 of 3 shards" in words
    assert words.count("No shard is committed yet.") == 4


def test_no_dataset_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="which does not exist, wanted a dataset's folder"):
        main([str(tmp_path / "none")])
    with pytest.raises(InputError, match=r"--out: got .*, whose folder does not exist"):
        main([str(tmp_path / "none"), "--out", str(tmp_path / "no" / "page.html")])
    assert list(tmp_path.iterdir()) == []


def test_the_compute_map_shows_the_depth_of_every_token(tmp_path: Path):
    storage = Storage.open(tmp_path / "out")
    plan = make_plan({0: 2}, **WITH_DEPTH_MAPS)
    found = survey(storage, write_dataset(storage, plan, tmp_path / "scratch"), 1)
    ((_, [picture]),) = found.by_subject
    want_N = fake_batch(plan, [0]).depths_BN[0]
    assert np.concatenate([scale.ravel() for scale in picture.depths]).tolist() == want_N.tolist()
    strip = Image.open(io.BytesIO(base64.b64decode(depth_strip(picture).partition(",")[2])))
    assert strip.size == (4 * 64 + 3 * 6, 64)
    colour = [tuple(int(c) for c in colormaps["viridis"](d / 4, bytes=True)) for d in range(5)]
    for y in range(3):
        for x in range(3):
            depth = want_N[5 + 3 * y + x]
            assert strip.getpixel((3 * 70 + 10 + 21 * x, 10 + 21 * y)) == colour[depth]
    assert {strip.getpixel((70 + x, 32)) for x in (0, 63)} == {colour[4]}
    assert strip.getpixel((67, 32))[3] == 0
    page = Page(render(found).decode())
    assert "Depth of the tokens of sample 000000000000" in str(page.all("img")[-1]["alt"])


def test_large_images_are_shown_smaller():
    pixels = np.full((300, 300, 3), (200, 100, 50), dtype=np.uint8)
    uri = data_uri(Picture("000000000000", "x", 0.0, pixels))
    assert uri.startswith("data:image/jpeg;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert image.size == (192, 192)
    assert np.abs(np.asarray(image).astype(int) - (200, 100, 50)).max() <= 3
