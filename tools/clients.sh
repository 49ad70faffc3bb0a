#!/bin/sh
# The clients that the server's tests run but the development environment does not hold: each in an environment of its own, below
# .venv/clients or GEMCUTTER_CLIENTS. Downloads about a gigabyte, most of it torch for lm-eval. Read tests/clients next.
set -eu
cd "$(dirname "$0")/.."
folder=${GEMCUTTER_CLIENTS:-.venv/clients}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$folder"

environment() { # NAME REQUIREMENT...
    name=$1
    shift
    [ -x "$folder/$name/bin/python" ] || "$python" -m venv "$folder/$name"
    "$folder/$name/bin/python" -m pip install -q "$@"
}

environment openai1 "openai==1.109.1"
environment langchain "langchain-openai>=1.7"
environment litellm "litellm>=1.110"
environment lmeval "torch>=2.13" "lm-eval[api]>=0.4.13"
if command -v npm > /dev/null; then
    mkdir -p "$folder/ai"
    npm install --silent --no-audit --no-fund --prefix "$folder/ai" ai@6 @ai-sdk/openai-compatible@2 zod
else
    echo "no npm: the AI SDK's test is skipped" >&2
fi
