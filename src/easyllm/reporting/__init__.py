"""Reports of training runs: the page `report.html` and TensorBoard files.

Training does not depend on this package: `easyllm train` and `easyllm run` pass its callbacks.

    train(config, output, callbacks=reporting_callbacks(config))
"""

from easyllm.reporting.callbacks import TensorBoard, WriteReport, reporting_callbacks
from easyllm.reporting.run_report import REPORT_FILE, RunReport, write_report

__all__ = [
    "REPORT_FILE",
    "RunReport",
    "TensorBoard",
    "WriteReport",
    "reporting_callbacks",
    "write_report",
]
