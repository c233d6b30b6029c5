"""Rates for predictions on a machine without a calibration of its own, measured on the machine that they name.

By `trilevel bench calibrate --threads 1` on 25 November 2026, to three digits; decision 0007 says how far they are off.
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
            calls=262000.0,
            classes=752000.0,
            heads=0.0,
            bytes_=0.257,
            fresh=0.291,
            near=0.1,
            tail=3.23,
            products=0.0,
            folded=0.333,
            pooled=1.05,
        ),
        ("blocked", "float32"): Work(
            calls=0.0,
            classes=1100000.0,
            heads=0.0,
            bytes_=0.101,
            fresh=0.191,
            near=10.1,
            tail=14.3,
            products=0.0,
            folded=6.1,
            pooled=0.667,
        ),
        ("native", "bfloat16"): Work(
            calls=552000.0,
            classes=608000.0,
            heads=0.0,
            bytes_=0.0708,
            fresh=0.538,
            near=0.0,
            tail=0.0,
            products=0.0367,
            folded=0.781,
            pooled=4.71,
        ),
        ("blocked", "bfloat16"): Work(
            calls=2130000.0,
            classes=227000.0,
            heads=97800.0,
            bytes_=0.472,
            fresh=0.734,
            near=0.17,
            tail=17.2,
            products=0.0,
            folded=9.25,
            pooled=1.31,
        ),
        ("dense", "float32"): Work(
            calls=458000.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.0229,
            fresh=0.0,
            near=0.364,
            tail=0.0,
            products=0.0486,
            folded=0.0,
            pooled=0.0,
        ),
        ("dense", "bfloat16"): Work(
            calls=699000.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.178,
            fresh=0.0,
            near=0.516,
            tail=0.0,
            products=0.0451,
            folded=0.0,
            pooled=0.0,
        ),
    },
)
