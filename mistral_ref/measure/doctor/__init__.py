"""The doctor: what is wrong or suspicious in the files of a model. It reads, and runs no pass.

from mistral_ref.measure import doctor

report = doctor.examine("path/to/dir")
for finding in report.findings:
    print(finding.severity, finding.file, finding.what, finding.why, finding.cure)
"""

from __future__ import annotations

from mistral_ref.measure.doctor.examination import Report, examine
from mistral_ref.measure.doctor.finding import Finding

__all__ = ["Finding", "Report", "examine"]
