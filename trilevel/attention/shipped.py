"""Rates for predictions on a machine without a calibration of its own, measured on the machine that they name.

By `trilevel bench calibrate --threads 1` on 24 November 2026, to three digits; decision 0007 says how far they are off.
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
            calls=148000.0,
            classes=656000.0,
            heads=0.0,
            bytes_=0.209,
            fresh=0.508,
            near=0.0,
            tail=2.33,
            products=0.0,
            folded=0.697,
            pooled=0.56,
        ),
        ("blocked", "float32"): Work(
            calls=441000.0,
            classes=477000.0,
            heads=0.0,
            bytes_=0.281,
            fresh=0.246,
            near=4.44,
            tail=10.9,
            products=0.0,
            folded=4.52,
            pooled=0.0,
        ),
        ("native", "bfloat16"): Work(
            calls=189000.0,
            classes=631000.0,
            heads=0.0,
            bytes_=0.211,
            fresh=0.0,
            near=0.558,
            tail=2.0,
            products=0.0,
            folded=0.838,
            pooled=2.11,
        ),
        ("blocked", "bfloat16"): Work(
            calls=339000.0,
            classes=598000.0,
            heads=99100.0,
            bytes_=0.271,
            fresh=0.0238,
            near=3.4,
            tail=10.6,
            products=0.0,
            folded=7.73,
            pooled=1.23,
        ),
        ("dense", "float32"): Work(
            calls=117000.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.0575,
            fresh=0.0,
            near=0.434,
            tail=0.0,
            products=0.0419,
            folded=0.0,
            pooled=0.0,
        ),
        ("dense", "bfloat16"): Work(
            calls=0.0,
            classes=0.0,
            heads=0.0,
            bytes_=0.364,
            fresh=0.0,
            near=0.724,
            tail=0.0,
            products=0.0382,
            folded=0.0,
            pooled=0.0,
        ),
    },
)
