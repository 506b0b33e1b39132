"""Whether alerts of this machine have an address that can be one; nothing is posted."""

from mllm_assets.alerts import check_address, webhook_url
from mllm_assets.errors import SourceError
from mllm_assets.operations.findings import Finding


def check_alerts() -> list[Finding]:
    """Look at the webhook's address, where one is set."""
    if not (url := webhook_url()):
        return []
    try:
        check_address(url)
    except SourceError as error:
        return [Finding.of_error("alerts", "fail", error)]
    return [Finding("alerts", "ok", "a webhook is set; nothing was posted to it")]
