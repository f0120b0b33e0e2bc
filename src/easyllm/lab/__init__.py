"""Labs: one experiment for each topic, run with the library's own public functions."""

from easyllm.core.lazy import lazy_exports

__getattr__ = lazy_exports(
    __name__,
    {
        "Claim": "easyllm.lab.lab",
        "Lab": "easyllm.lab.lab",
        "LabConfig": "easyllm.lab.lab",
        "Number": "easyllm.lab.lab",
        "Result": "easyllm.lab.lab",
        "Text": "easyllm.lab.lab",
        "find_lab": "easyllm.lab.catalogue",
        "all_labs": "easyllm.lab.catalogue",
        "run_lab": "easyllm.lab.runner",
    },
)

__all__ = [
    "Claim",
    "Lab",
    "LabConfig",
    "Number",
    "Result",
    "Text",
    "all_labs",
    "find_lab",
    "run_lab",
]
