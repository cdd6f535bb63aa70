"""Small images in the metric of their files of full size."""

import torch
from fakes import TinyEncoder

from hf_equiv.data.resampling import view_of
from hf_equiv.full_size.metric import FileMetric


def test_lengths_are_those_of_the_shortest_changes_of_a_photo():
    encoder = TinyEncoder()
    metric, view = FileMetric(encoder), view_of(encoder, 64, 64)
    y = 0.01 * torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grey = metric.invert(torch.full_like(y, 0.5))
    change = metric.place(grey + y) - 0.5
    down, across = (torch.linalg.pinv(axis.matrix / 2**22) for axis in (view.down, view.across))
    photo = down @ change @ across.T
    torch.testing.assert_close(photo.flatten(1).norm(dim=1), 4 * y.flatten(1).norm(dim=1), rtol=1e-9, atol=0)


def test_an_image_comes_back_and_stays_in_the_box():
    metric = FileMetric(TinyEncoder())
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(metric.place(metric.invert(x)), x, rtol=0, atol=1e-5)
    assert torch.equal(metric.place(metric.invert(x))[1:], metric.place(metric.invert(x[1:])))
    assert float(metric.place(10 * metric.invert(x)).max()) == 1
    f = metric.of(lambda pixels: pixels.mean((2, 3)))
    torch.testing.assert_close(f(metric.invert(x)), x.mean((2, 3)))
