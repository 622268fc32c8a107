# snakemake --cores 8 all                                       every table and figure, on the embedded stand-ins
# snakemake --cores 8 --config profile=smoke -- all              tiny random models, for a look at the DAG
# snakemake --workflow-profile workflow/profiles/slurm all      the same on a SLURM cluster
from snakemake.utils import min_version

min_version("9.0")


configfile: "workflow/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/operating_point.smk"
include: "workflow/rules/report.smk"


localrules:
    all,


rule all:
    default_target: True
    input:
        f"{ROOT}/records.parquet",
        f"{ROOT}/tables",
        f"{ROOT}/figures",
        f"{ROOT}/claims",
