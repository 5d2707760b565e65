"""What was done and what it costs: reports, costs before and after, and the profile of a model's layers.

In: a rewritten program or a model. Out: records that print as tables and turn into plain dicts.
"""

from vlmrewrite.report.layer_profile import LayerProfile, calibration, first_token_kl, measure, profile
from vlmrewrite.report.page import program_html, report_html
from vlmrewrite.report.plot import check_plot
from vlmrewrite.report.programs import Tried, captured, next_token, tried, under
from vlmrewrite.report.report import Report, make_report, report_on
from vlmrewrite.report.summary import summary, verdict

__all__ = [
    "LayerProfile",
    "Report",
    "Tried",
    "calibration",
    "captured",
    "check_plot",
    "first_token_kl",
    "make_report",
    "measure",
    "next_token",
    "profile",
    "program_html",
    "report_html",
    "report_on",
    "summary",
    "tried",
    "under",
    "verdict",
]
