# The server: docker build -t softprompt .
# For a GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
RUN python -m venv /opt/softprompt
ENV PATH=/opt/softprompt/bin:$PATH
RUN pip install --no-cache-dir --index-url ${TORCH_INDEX} "torch>=2.13,<2.15"
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN grep -v '^torch==' constraints.txt > without-torch.txt \
    && pip install --no-cache-dir --constraint without-torch.txt '.[serve,structured,data]'

FROM python:3.11-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin softprompt
COPY --from=build /opt/softprompt /opt/softprompt
# Everything that is written goes to /tmp, so the root may be read-only; models and prompts are mounted.
ENV PATH=/opt/softprompt/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/models/hub \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["softprompt"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--base-model", "/models/base", "--prompts", "/prompts"]
