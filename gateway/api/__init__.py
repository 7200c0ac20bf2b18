"""The HTTP API in front of the queue: requests of OpenAI, Cohere, Jina and TEI become calls. Start reading at app.py.

Each family of routes is a module that only translates: openai.py, cohere.py, tei.py, services.py. calling.py makes the
calls, errors.py writes what fails. No module here keeps a state that another process would need.
"""
