"""OpenAI's API as pure functions: bodies of requests into calls, and their outcomes into bodies of answers.

Bulk runs use it for batch files; code that serves HTTP can use it for requests. It knows no server, no clock and no
HTTP library. Start with `requests.py` (body to call), then `answers.py` (outcomes to body) and `batch.py` (lines of
files).
"""
