# A server of a model on the CPU:
#
#   docker build -t gptfast .
#   docker run -p 8000:8000 -e GPTFAST_API_KEY=secret -v $PWD/runs/bard/best:/model:ro gptfast
#
# The page is then at http://127.0.0.1:8000/ and asks for the key, without which no server listens on all addresses.
# Other commands: docker run … gptfast generate --model /model --prompt "ROMEO:"

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir "setuptools>=77" ninja wheel
COPY . /src
RUN pip install --no-cache-dir --no-build-isolation "/src/.[serve]"

FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
RUN useradd --create-home gptfast
USER gptfast
EXPOSE 8000
ENTRYPOINT ["gptfast"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0"]
