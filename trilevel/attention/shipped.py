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
            calls=85500.0,
            classes=697000.0,
            bytes_=0.135,
            spilled=0.0283,
            fresh=0.44,
            near=0.0,
            tail=0.831,
            products=0.0517,
            folded=0.528,
            pooled=0.976,
        ),
        ("blocked", "float32"): Work(
            calls=0.0,
            classes=749000.0,
            bytes_=0.0264,
            spilled=0.0,
            fresh=0.711,
            near=5.73,
            tail=3.96,
            products=0.127,
            folded=7.4,
            pooled=0.0,
        ),
        ("dense", "float32"): Work(
            calls=0.0,
            classes=0.0,
            bytes_=0.0,
            spilled=0.0,
            fresh=0.0,
            near=0.518,
            tail=0.0,
            products=0.0421,
            folded=0.0,
            pooled=0.0,
        ),
        ("native", "bfloat16"): Work(
            calls=181000.0,
            classes=746000.0,
            bytes_=0.222,
            spilled=0.0,
            fresh=0.507,
            near=0.334,
            tail=1.06,
            products=0.0257,
            folded=0.43,
            pooled=1.82,
        ),
        ("blocked", "bfloat16"): Work(
            calls=756000.0,
            classes=465000.0,
            bytes_=0.549,
            spilled=0.0,
            fresh=0.0,
            near=2.35,
            tail=15.7,
            products=0.0,
            folded=7.6,
            pooled=0.0,
        ),
        ("dense", "bfloat16"): Work(
            calls=0.0,
            classes=0.0,
            bytes_=0.0858,
            spilled=0.0,
            fresh=0.0,
            near=0.597,
            tail=0.0,
            products=0.0443,
            folded=0.0,
            pooled=0.0,
        ),
    },
)
