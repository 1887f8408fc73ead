import pytest

from lightning_igpt.planning import DEVICES, device_called, find_device, usable_bytes


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
        ("Tesla V100-PCIE-16GB", "v100-16"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
    ],
)
def test_devices_are_known_by_torchs_names(name, key):
    assert device_called(name) is DEVICES[key]
    assert find_device(name) is find_device(name.lower()) is DEVICES[key]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA A40",
        "NVIDIA L40",
        "NVIDIA H20",
        "NVIDIA RTX A1000",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "nvidia h100 80gb hbm3 mig 1g.10gb",
    ],
)
def test_other_devices_are_not_taken_for_these(name):
    assert device_called(name) is None


def test_keys_may_be_written_in_many_ways():
    for key, device in DEVICES.items():
        assert find_device(key) is find_device(key.upper()) is find_device(key.replace("-", " ")) is device
    assert find_device("A100") is find_device("a100-80gb") is DEVICES["a100-80"]
    assert find_device("v100-32gb") is DEVICES["v100"] and find_device("V100 16GB").memory == 16 * 2**30
    assert find_device("RTX 4090") is DEVICES["rtx4090"]
    assert find_device("h100-sxm") is DEVICES["h100"]


def test_an_unknown_device_gets_the_list_and_a_hint():
    with pytest.raises(ValueError, match=r"no device 'h1000'; did you mean 'h100'\? Devices: b200, .*rtx3090, and cpu"):
        find_device("h1000")
    with pytest.raises(ValueError, match=r"no device 'zz'\. Devices: b200"):
        find_device("zz")


def test_the_figures_are_plausible():
    for device in DEVICES.values():
        assert device.source
        assert 16 <= device.memory / 2**30 <= 192
        assert device.tflops_32 <= (device.tflops_tf32 or device.tflops_32) < device.tflops_16
        assert device.measured_16 is None or device.measured_16 < device.tflops_16
        assert device.reached("bf16-mixed") <= device.peak("bf16-mixed") == device.tflops_16 * 1e12
        assert device.reached_bandwidth <= device.bandwidth
        assert 250e9 < device.bandwidth <= 8e12


def test_usable_memory():
    assert usable_bytes(80 * 2**30) == DEVICES["h100"].usable == 74 * 2**30


def test_float32_is_tf32_where_the_device_has_it_and_it_is_allowed():
    assert DEVICES["a100-80"].peak("32-true") == 156e12
    assert DEVICES["a100-80"].peak("32-true", tf32=False) == 19.5e12
    assert DEVICES["v100"].peak("32-true") == 15.7e12
    assert DEVICES["v100"].peak("16-mixed") == 125e12
