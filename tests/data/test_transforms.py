import pickle

import numpy as np
import pytest
import torch
from builders import input_of
from PIL import Image

from toolchain.data.transforms import Preprocessing, Wanted
from toolchain.errors import DataError

COLOUR = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.3), "interpolation": "bicubic", "crop_pct": 0.5}


def test_pixels_are_normalised_and_repeated_over_the_channels():
    used = Preprocessing((3, 2, 2), (0.5, 0.25, 0.0), (0.5, 1.0, 2.0), "bilinear")
    out = used.of_pixels(torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8))
    grey = torch.tensor([[0.0, 1.0], [0.2, 0.4]])
    expected = torch.stack([(grey - 0.5) / 0.5, grey - 0.25, grey / 2])[None]
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous()


def test_resizing_keeps_a_constant_and_is_antialiased():
    used = Preprocessing((1, 4, 4), (0.0,), (1.0,), "bilinear")
    torch.testing.assert_close(used.of_pixels(torch.full((1, 1, 16, 16), 0.3)), torch.full((1, 1, 4, 4), 0.3))
    stripes = torch.tensor([0.0, 1.0]).repeat(8).expand(1, 1, 16, 16)
    assert (used.of_pixels(stripes)[..., 1:3] - 0.5).abs().max() < 0.1


def test_a_picture_goes_through_the_models_own_transform():
    used = Wanted((3, 8, 8), COLOUR).natural()
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[8:24, 8:24] = (255, 102, 51)  # crop_pct 0.5 keeps exactly this square
    out = input_of(used, Image.fromarray(pixels))
    expected = (torch.tensor([1.0, 0.4, 0.2]) - torch.tensor(COLOUR["mean"])) / torch.tensor(COLOUR["std"])
    torch.testing.assert_close(out[:, 2:6, 2:6], expected[:, None, None].expand(3, 4, 4))
    whole = input_of(Wanted((3, 8, 8), COLOUR, crop_pct=1.0).natural(), Image.fromarray(pixels))
    assert not torch.allclose(whole, out)


def test_grey_models_average_the_statistics_and_decode_grey():
    used = Wanted((1, 8, 8), COLOUR).natural()
    assert used.mean == pytest.approx((0.4,))
    assert used.std == pytest.approx((0.2,))
    out = input_of(used, Image.new("RGB", (8, 8), (102, 102, 102)))
    torch.testing.assert_close(out, torch.zeros(1, 8, 8))


def test_the_recipe_overrides_mean_and_std():
    assert Wanted((3, 8, 8), COLOUR, mean=(0.1, 0.2, 0.3), std=(0.5,)).natural().mean == (0.1, 0.2, 0.3)
    assert Wanted((3, 8, 8), COLOUR, std=(0.5,)).natural().std == (0.5, 0.5, 0.5)
    assert Wanted((1, 8, 8), {}, mean=(0.1,)).declared(0.9, 1.0).mean == (0.1,)


def test_the_recipe_overrides_the_filter_and_the_crop():
    """Kind: a key of timm's evaluation that the recipe cannot say, and whose error sends to the inside of timm."""
    used = Wanted((3, 8, 8), COLOUR, interpolation="lanczos", crop_mode="squash", crop_pct=1.0).natural()
    assert (used.interpolation, used.crop_mode, used.crop_pct) == ("lanczos", "squash", 1.0)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    squeezed = Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS)
    assert used.pixels_of(Image.fromarray(pixels)).equal(torch.from_numpy(np.array(squeezed)).permute(2, 0, 1))
    kept = Wanted((3, 8, 8), COLOUR).natural()
    assert (kept.interpolation, kept.crop_mode) == ("bicubic", "center")


def test_preprocessing_reaches_worker_processes():
    used = Wanted((3, 8, 8), COLOUR).natural()
    assert pickle.loads(pickle.dumps(used)) == used


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wanted((3, 8, 8), COLOUR, mean=(0.1, 0.2)).natural(), r"data\.mean has 2 values for 3 channels"),
        (lambda: Wanted((3, 8, 8), COLOUR, std=(0.1, 0.0, 1.0)).natural(), r"data\.std is .* above 0"),
        (lambda: Wanted((3, 8, 8), COLOUR, mean=(123.675,)).natural(), r"mean is \[123\.675\]; .* Divide by 255"),
        (
            lambda: Wanted((1, 8, 8), {}, std=(float("nan"),)).declared(0.0, 1.0),
            r"std is \[nan\]; it is for pixels in 0…1",
        ),
        (lambda: Wanted((4, 8, 8), COLOUR).natural(), "4 channels"),
        (lambda: Wanted((1, 8, 8), {}, crop_pct=0.9).declared(0.0, 1.0), r"never cropped, but data\.crop_pct"),
        (lambda: Wanted((1, 8, 8), {}, crop_mode="squash").declared(0.0, 1.0), r"never cropped, but data\.crop_mode"),
        (lambda: Wanted((1, 8, 8), {}, interpolation="box").declared(0.0, 1.0), "by bilinear, always"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()
