# `mllm-msr serve` on a CPU. The run is mounted, and so is the folder of the server's state:
#
#   docker build -t mllm-msr .
#   docker run -p 8080:8080 -e MLLM_MSR_WRITE_KEYS="$KEY" -v "$PWD/demo_output:/served:ro" -v mllm-msr-state:/state mllm-msr
FROM python:3.12-slim

# torch first and by its exact version, from where its builds without CUDA are
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /app
COPY constraints.txt ./
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX" --requirement torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY modeling modeling
COPY processing processing
COPY training training
COPY hub_cards hub_cards
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve]' \
    && useradd --create-home --uid 1000 server \
    && install --directory --owner server /state

USER 1000
ENV HF_HOME=/state/huggingface PYTHONUNBUFFERED=1
VOLUME /state
EXPOSE 8080
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["mllm-msr", "serve"]
CMD ["/served", "--host", "0.0.0.0", "--port", "8080", "--state", "/state/state.sqlite"]
