# docker build --target tpu -t instdiff:tpu .     targets: cpu, tpu, gpu, studio
FROM python:3.12-slim AS base
WORKDIR /instdiff
COPY requirements.txt ./

FROM base AS cpu
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "sample.py"]

FROM base AS tpu
RUN pip install --no-cache-dir -r requirements.txt "jax[tpu]" gcsfs google-cloud-storage
COPY . .
CMD ["python", "sample.py"]

FROM base AS gpu
RUN pip install --no-cache-dir -r requirements.txt "jax[cuda12]" gcsfs google-cloud-storage
COPY . .
CMD ["python", "sample.py"]

# docker run -p 7860:7860 instdiff:studio     prints the address with its token
FROM base AS studio
RUN pip install --no-cache-dir -r requirements.txt fastapi uvicorn prometheus-client
COPY . .
CMD ["python", "-m", "instdiff_jax", "studio", "--host", "0.0.0.0", "--no_browser"]
