import torch
import torch.nn.functional as F

from lightning_igpt.weights.positions import interpolate_positions


def test_a_smooth_table_is_sampled_at_the_new_pixels():
    """A ramp over rows and columns stays one: two dimensions, raster order, pixel centres."""

    def ramp(side):
        centres = (torch.arange(side) + 0.5) / side
        return torch.stack([centres.repeat_interleave(side), centres.repeat(side)], 1)  # (S * S, 2): row, column

    for old, new in [(8, 12), (12, 8), (8, 16)]:
        inner = torch.zeros(new, new, dtype=torch.bool)
        inner[3:-3, 3:-3] = True  # the border has no neighbours to go by
        difference = (interpolate_positions(ramp(old), new) - ramp(new)).abs()[inner.flatten()]
        assert difference.max() < 0.01  # torch's kernel bends a ramp by half a hundredth; a pixel is 0.06 to 0.125


def test_same_size_is_the_same_table_and_shrinking_averages():
    table = torch.randn(64, 5)
    assert interpolate_positions(table, 8) is table
    noise = torch.randn(32 * 32, 5, generator=torch.manual_seed(0))
    small = interpolate_positions(noise, 8)
    grid = noise.T.reshape(1, 5, 32, 32)
    skipping = F.interpolate(grid, size=(8, 8), mode="bicubic").flatten(2)[0].T
    assert small.shape == (64, 5) and small.std() < skipping.std() / 2
