"""An HTTP server that speaks the OpenAI protocol: completions and chats. Needs the extra `serve`."""
