"""Rates for predictions on a machine without a calibration of its own, measured on the machine that they name.

Those of `benchmarks/results/calibrate.json`, to three digits.
"""

from __future__ import annotations

from trilevel.attention.calibration import Calibration, Work

CALIBRATION = Calibration(
    machine={
        "cpu": "AMD EPYC",
        "isa": "avx512_bf16",
        "threads": "1",
        "torch": "2.13.0+cpu",
        "trilevel": "0.2.0",
    },
    rates={
        ("native", "float32"): Work(
            calls=44500.0,
            classes=620000.0,
            heads=0.0,
            bytes_=0.158,
            fresh=0.702,
            near=0.66,
            tail=1.51,
            products=0.0201,
            folded=0.613,
            pooled=0.799,
        ),
        ("blocked", "float32"): Work(
            calls=372000.0,
            classes=374000.0,
            heads=0.0,
            bytes_=0.308,
            fresh=0.565,
            near=4.35,
            tail=11.5,
            products=0.000875,
            folded=4.84,
            pooled=0.0,
        ),
        ("native", "bfloat16"): Work(
            calls=154000.0,
            classes=555000.0,
            heads=0.0,
            bytes_=0.223,
            fresh=0.0,
            near=0.957,
            tail=1.8,
            products=0.0,
            folded=0.504,
            pooled=2.05,
        ),
        ("blocked", "bfloat16"): Work(
            calls=594000.0,
            classes=535000.0,
            heads=0.0,
            bytes_=0.517,
            fresh=0.0,
            near=0.629,
            tail=8.87,
            products=0.0,
            folded=7.68,
            pooled=0.898,
        ),
        ("dense", "float32"): Work(
            calls=25600.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.0,
            fresh=0.0,
            near=0.495,
            tail=0.0,
            products=0.0413,
            folded=0.0,
            pooled=0.0,
        ),
        ("dense", "bfloat16"): Work(
            calls=27400.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.253,
            fresh=0.0,
            near=0.682,
            tail=0.0,
            products=0.039,
            folded=0.0,
            pooled=0.0,
        ),
    },
)
