"""An HTTP server that speaks the OpenAI completions protocol. Needs the extra `serve`."""
