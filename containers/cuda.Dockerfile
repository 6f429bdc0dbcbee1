# `saisa serve` with vLLM on NVIDIA GPUs. From the root of the repository:
#   docker build -f containers/cuda.Dockerfile -t saisa-serve .
# vLLM's own image brings CUDA, PyTorch and vLLM of one release, which is the one that the plug-in is tested with.
FROM vllm/vllm-openai:v0.32.0

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# --no-deps: PyTorch, transformers and the rest stay as vLLM's image has them.
COPY pyproject.toml README.md LICENSE /opt/saisa/
COPY src /opt/saisa/src
RUN uv pip install --system --no-cache --no-deps "setuptools==80.9.0" "accelerate==1.15.0" \
    && uv pip install --system --no-cache --no-deps --no-build-isolation /opt/saisa \
    && python3 -c "import accelerate, saisa_hf.serving.run as r; assert 'vllm' in r.BACKENDS" \
    && python3 -c "import importlib.metadata as m; assert m.version('vllm').startswith('0.32.'), m.version('vllm')" \
    && rm -r /opt/saisa

# Nobody's account but the server's. The folder is made here so that a new volume belongs to it.
RUN useradd --create-home --uid 10001 --shell /usr/sbin/nologin saisa \
    && mkdir -p /home/saisa/.cache/huggingface \
    && chown -R saisa:saisa /home/saisa
USER 10001
ENV HOME=/home/saisa \
    HF_HOME=/home/saisa/.cache/huggingface \
    VLLM_DO_NOT_TRACK=1
WORKDIR /home/saisa
VOLUME ["/home/saisa/.cache/huggingface"]

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The host is inside of the container: which addresses reach it is said by `docker run -p`.
ENTRYPOINT ["saisa", "serve", "--backend", "vllm", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--help"]
